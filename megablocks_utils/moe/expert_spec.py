"""What the experts of a layer are: read off transformers' module, once, and true of ours too."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.families import UNMARKED_EXPERTS, UnmarkedExperts
from megablocks_utils.kernels.gate import (
    ActivationGate,
    Gate,
    list_activations,
    list_gates,
    recognise_gate,
)

__all__ = [
    "ExpertSpec",
    "find_expert_modules",
    "find_expert_parameters",
    "read_expert_spec",
]

# What transformers' experts interface sets in every module that it serves.
_MARK = "_is_expert_parallel"
_POST_NORM = "post_expert_norm"


@dataclass(frozen=True)
class ExpertSpec:
    """What the experts of a layer are and how their weights are stored.

    The first projection has F outputs: 2 * I with a gate, I without.

    Attributes:
        num_experts: E, without zero experts.
        hidden_size: H, of what the experts are given; the model's own or a latent size.
        intermediate_size: I.
        first_projection: name of the first weights: "gate_up_proj", or "up_proj" without a gate.
        has_gate: whether the first projection has a gate beside up.
        has_bias: whether both projections have a bias, (E, F) and (E, H).
        is_transposed: whether weights are stored (E, in, out) instead of (E, out, in).
        is_interleaved: whether outputs of the first projection are gate, up, gate, up, ...
        gate: makes (R, I) of gate and up, (R, I) each; of up alone without a gate.
        num_zero_experts: how many expert numbers from E on return the token as it is.
        has_post_norm: whether `post_expert_norm` normalises each expert's result before it is
            weighted.
        is_weighted_before: whether the tokens are weighted before the experts, in the block.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    first_projection: str
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_interleaved: bool
    gate: Gate
    num_zero_experts: int = 0
    has_post_norm: bool = False
    is_weighted_before: bool = False

    @property
    def projections(self) -> tuple[str, str]:
        """Names of the two weights."""
        return self.first_projection, "down_proj"

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the experts' parameters: the projections, and their biases if they have any."""
        biases = [f"{name}_bias" for name in self.projections] if self.has_bias else []
        return (*self.projections, *biases)


def find_expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Find the experts of every MoE layer, transformers' or ours: qualified name -> module.

    They are recognised by the mark of transformers' experts interface, not by names or shapes.
    """
    return {name: module for name, module in model.named_modules() if _is_experts(module)}


def find_expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the experts' own weights and biases, without adapters, by qualified name."""
    return {
        f"{module_name}.{name}": module.get_parameter(name)
        for module_name, module in find_expert_modules(model).items()
        for name in read_parameter_names(module)
    }


def read_parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return what `ExpertSpec.parameter_names` is, without looking for the gate."""
    if isinstance(spec := getattr(module, "spec", None), ExpertSpec):
        return spec.parameter_names
    return _read_storage(module, lambda gate, up: up).parameter_names


def read_expert_spec(module: nn.Module) -> ExpertSpec:
    """Read off what the experts of a layer are.

    Args:
        module: from `find_expert_modules`; it may be on meta.

    Raises:
        ConfigurationError: weights that the interface does not describe.
    """
    if isinstance(spec := getattr(module, "spec", None), ExpertSpec):
        return spec
    spec = _read_storage(module, _find_gate(module))
    _refuse_unknown_parameters(module, spec)
    return spec


def _is_experts(module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "spec", None), ExpertSpec)
        or hasattr(module, _MARK)
        or type(module).__name__ in UNMARKED_EXPERTS
    )


def _read_storage(module: nn.Module, gate: Gate) -> ExpertSpec:
    known = UNMARKED_EXPERTS.get(type(module).__name__, UnmarkedExperts())
    has_gate = getattr(module, "has_gate", True)
    first = "gate_up_proj" if has_gate else "up_proj"
    is_transposed = getattr(module, "is_transposed", known.is_transposed)
    num_experts, *sizes = _shape(module, "down_proj")
    num_rows, *first_sizes = _shape(module, first)
    hidden_size, intermediate_size = reversed(sizes) if is_transposed else sizes
    outputs = intermediate_size * (2 if has_gate else 1)
    wanted = [hidden_size, outputs] if is_transposed else [outputs, hidden_size]
    if first_sizes != wanted or num_rows < num_experts:
        raise ConfigurationError(
            f"{first} of {type(module).__name__} is {(num_rows, *first_sizes)}, but it must be "
            f"{(num_experts, *wanted)} beside its down_proj."
        )
    return ExpertSpec(
        num_experts,
        hidden_size,
        intermediate_size,
        first,
        has_gate=has_gate,
        has_bias=getattr(module, "has_bias", False),
        is_transposed=is_transposed,
        is_interleaved=not getattr(module, "is_concatenated", True),
        gate=gate,
        # Rows that have no second projection are never computed with.
        num_zero_experts=num_rows - num_experts,
        has_post_norm=getattr(module, "has_post_expert_norm", False),
        is_weighted_before=known.is_weighted_before,
    )


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.dim() != 3:
        seen = "missing" if weight is None else f"not one tensor of three dims: {weight}"
        raise ConfigurationError(f"{name} of {type(module).__name__} is {seen}.")
    return tuple(weight.shape)


def _refuse_unknown_parameters(module: nn.Module, spec: ExpertSpec) -> None:
    """Refuse what would be left behind when the module's weights are taken."""
    for name, _ in module.named_parameters():
        is_norm = spec.has_post_norm and name.startswith(f"{_POST_NORM}.")
        if name not in spec.parameter_names and not is_norm:
            raise ConfigurationError(
                f"{type(module).__name__} has a parameter {name}, and transformers' experts "
                "interface does not say what it does."
            )


def _find_gate(module: nn.Module) -> Gate:
    """Return the module's gate: one that the kernels know where its values are the same."""
    shell = _strip_weights(module)
    device = next((tensor.device for tensor in _tensors(shell)), torch.device("cpu"))
    activation = getattr(module, "act_fn", None)
    if not getattr(module, "has_gate", True):
        return recognise_gate(_checked(module, activation), list_activations(), device)
    if hasattr(module, "_apply_gate"):
        own: Gate = OwnGate(shell, not getattr(module, "is_concatenated", True))
    else:
        own = ActivationGate(_checked(module, activation))
    return recognise_gate(own, list_gates(_numbers(shell)), device)


def _checked(module: nn.Module, activation: object) -> Callable[[Tensor], Tensor]:
    if not callable(activation):
        raise ConfigurationError(f"{type(module).__name__} has no act_fn between its projections.")
    return activation


@dataclass(frozen=True)
class OwnGate:
    """Call a module's own `_apply_gate`, which splits what it is given.

    Attributes:
        shell: the module without its weights.
        is_interleaved: how it splits.
    """

    shell: nn.Module
    is_interleaved: bool

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Apply it to gate and up (R, I) each."""
        if self.is_interleaved:
            joined = torch.stack([gate, up], dim=-1).flatten(-2)
        else:
            joined = torch.cat([gate, up], dim=-1)
        return self.shell._apply_gate(joined)


def _strip_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a module without its parameters, so that its gate keeps none alive."""
    shell = copy.copy(module)
    shell._parameters = {}
    shell._modules = {name: part for name, part in module._modules.items() if name != _POST_NORM}
    return shell


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _numbers(module: nn.Module) -> Iterator[float]:
    """Yield every number that a module holds, under whatever name: its gate's are among them."""
    for value in (value for part in module.modules() for value in vars(part).values()):
        if isinstance(value, float | int) and not isinstance(value, bool):
            yield float(value)
