"""Compile the dense parts of decoder layers, with one compiled code for each class of module.

A part is a module beside the experts: a norm, an attention with its projections and rotary
embedding, a router, a shared or dense feed-forward block. Not compiled are the experts (exchanges,
kernels, a read of counts on the host), what a layer computes between its parts, and modules of
torch itself, which are one kernel each already. Attention that torch computes by operators is in
the graph of its part; any other is called between the part's two graphs.

Facts about torch 2.13 that shape this module:

- `forward` is compiled, not `__call__`: hooks (of FSDP, of what counts or records) stay outside,
  and parameters keep their names.
- Compiled code is cached by function, not by module, so that all layers share it.
- All sizes are dynamic at once: otherwise what is computed would depend on which sizes came first,
  and a resumed run would differ from one that was not interrupted.
- What a checkpointed layer keeps by name (`mesh.recomputation`) is of the experts alone.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megablocks_utils.attention.implementation import own_implementation
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.moe.expert_spec import find_expert_modules

__all__ = ["BACKEND", "PartCode", "check_compiler", "compile_parts", "find_parts"]

BACKEND = "inductor"
_OPTIONS: Mapping[str, Any] = MappingProxyType({"deterministic": True})
"""Of inductor: no choice by measured times, which may round otherwise in the next process."""
_TRACED_ATTENTION = ("sdpa", "eager")
_MAX_GRAPHS = 16
"""Of a class. More than that is one for each layer, or for each number of tokens."""
_ALONE = "attention is computed as without compilation"
_REASON_CHARACTERS = 200
_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)


class PartCode:
    """Run the forward of all parts of a class: compiled, or eager where that cannot be.

    Args:
        kind: the class.
        backend: of torch.compile.
        report: told, in a sentence, if the class turns out not to be compiled.
        reason: why the class is not compiled, known before.

    Attributes:
        kind: the class.
        reason: why it is not compiled; empty while it is.
        num_graphs: graphs compiled so far.
    """

    def __init__(
        self,
        kind: type[nn.Module],
        backend: str,
        report: Callable[[str], None],
        reason: str = "",
    ) -> None:
        self.kind, self.reason, self.num_graphs = kind, reason, 0
        self._compile_graph: Callable[..., Any] = torch._dynamo.lookup_backend(backend)
        self._options = {"config_patches": dict(_OPTIONS)} if backend == "inductor" else {}
        self._report = report
        self._has_breaks = False
        self._compiled = self._compile()

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's forward returns."""
        while not self.reason:
            try:
                return self._run(module, *args, **kwargs)
            except _ERRORS as error:
                self._look_at(error)
        return self.kind.forward(module, *args, **kwargs)

    def describe(self) -> str:
        """Say that the class is not compiled, and why."""
        return f"warning: {self.kind.__name__} is not compiled: {self.reason}"

    def _compile(self) -> Callable[..., Any]:
        return torch.compile(
            self.kind.forward,
            backend=self._count_and_compile,
            dynamic=True,
            fullgraph=not self._has_breaks,
        )

    def _count_and_compile(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        self.num_graphs += 1
        if self.num_graphs > _MAX_GRAPHS:
            raise RuntimeError(f"it would be compiled more than {_MAX_GRAPHS} times")
        return self._compile_graph(graph, inputs, **self._options)

    def _run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self._has_breaks:
            return self._compiled(module, *args, **kwargs)
        num_graphs, known = self.num_graphs, set(counters["graph_break"])
        output = self._compiled(module, *args, **kwargs)
        if self.num_graphs > num_graphs:
            breaks = [text for text in counters["graph_break"] if text not in known]
            if other := [text for text in breaks if _ALONE not in text]:
                self._stop(_shorten(other[0]))
        return output

    def _look_at(self, error: Exception) -> None:
        if not self._has_breaks and _ALONE in str(error):
            self._has_breaks, self.num_graphs = True, 0
            self._compiled = self._compile()
            return
        self._stop(_describe(error))

    def _stop(self, reason: str) -> None:
        """Run eager from now on."""
        self.reason = reason
        self._report(self.describe())


def compile_parts(
    model: PreTrainedModel,
    *,
    backend: str | None = None,
    eager: Mapping[str, str] = MappingProxyType({}),
    report: Callable[[str], None],
) -> list[PartCode]:
    """Compile the parts of all decoder layers in place, when each is first called.

    Call it before FSDP wraps the model. Nothing that is saved changes.

    Args:
        model: adapters attached, checkpointing applied, its attention chosen.
        backend: of torch.compile; None: `BACKEND`.
        eager: classes that cannot be compiled, with reasons.
        report: told, in a sentence, of each further class that turns out not to be compiled.
    """
    _leave_attention_alone(model)
    codes: dict[type[nn.Module], PartCode] = {}
    for part in find_parts(model).values():
        kind = type(part)
        if kind not in codes:
            codes[kind] = PartCode(kind, backend or BACKEND, report, eager.get(kind.__name__, ""))
        part.forward = MethodType(codes[kind], part)
    return list(codes.values())


def find_parts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules of decoder layers that can be compiled: those with no experts inside."""
    experts = {id(module) for module in find_expert_modules(model).values()}
    kinds = set(model._no_split_modules or ())
    parts: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in kinds and not any(name.startswith(f"{n}.") for n in parts):
            parts.update(_parts_of(module, name, experts))
    return parts


def check_compiler(device: torch.device) -> None:
    """Compile a function of one operation, so that a missing compiler is known before all else.

    Raises:
        ConfigurationError: torch cannot compile here.
    """
    function = torch.compile(lambda x: x.sin() + 1, backend="inductor")
    try:
        if device.type == "cpu":
            get_cpp_compiler()  # what an earlier run has left needs none
        function(torch.zeros(8, device=device))
    except (*_ERRORS, InvalidCxxCompiler) as error:
        raise ConfigurationError(
            "compile is True, but it must be False on this machine, where torch builds no code: "
            f"{_describe(error)}.",
            parameters=("compile",),
        ) from error


def _parts_of(
    module: nn.Module, name: str, experts: Collection[int]
) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        full_name = f"{name}.{child_name}"
        if id(child) in experts or not any(True for _ in child.parameters()):
            continue
        holds_experts = any(id(inner) in experts for inner in child.modules())
        if holds_experts or type(child).forward is nn.Module.forward:
            yield from _parts_of(child, full_name, experts)
        elif not type(child).__module__.startswith("torch.nn.") and "forward" not in vars(child):
            yield full_name, child


def _leave_attention_alone(model: PreTrainedModel) -> None:
    """Let torch.compile not look into attention that is not made of torch's operators."""
    name = own_implementation(model)
    if name in _TRACED_ATTENTION or name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return
    function = ALL_ATTENTION_FUNCTIONS[name]
    if not getattr(function, "_torchdynamo_disable", False):
        AttentionInterface.register(name, torch.compiler.disable(function, reason=_ALONE))


def _describe(error: Exception) -> str:
    cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
    return _shorten(str(cause)) or type(cause).__name__


def _shorten(text: str) -> str:
    """Return the first line of what torch says."""
    return " ".join(text.strip().partition("\n")[0].split())[:_REASON_CHARACTERS].rstrip(".")
