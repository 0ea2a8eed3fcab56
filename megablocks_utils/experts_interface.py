"""Run the experts of any transformers model on this project's kernels: one process, no sharding.

transformers hands each experts module to the function that its `experts_implementation` names.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from megablocks_utils.errors import ConfigurationError, MissingKernelError
from megablocks_utils.kernels.backends.backend import Backend, ExpertBackend
from megablocks_utils.kernels.backends.backend_table import BACKENDS
from megablocks_utils.kernels.device import DeviceFacts, read_device_facts
from megablocks_utils.kernels.gate import Gate, list_activations, list_gates, recognise_gate
from megablocks_utils.kernels.permute import sort_by_expert
from megablocks_utils.kernels.shapes import ExpertShapes, name_dtype
from megablocks_utils.kernels.weights import ExpertWeights

__all__ = ["register_experts_implementation"]

_PREFIX = "megablocks_utils_"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GATE_ATTRIBUTE = "_megablocks_utils_gate"
# What transformers' decorator says of a module, and what only one value of is supported.
_FLAGS = {"has_post_expert_norm": False}


def register_experts_implementation() -> None:
    """Let every transformers model take this project's kernels for its experts.

    After it, `experts_implementation` may be `"megablocks_utils_triton"` or
    `"megablocks_utils_grouped_mm"` in `from_pretrained`, `from_config` and
    `set_experts_implementation`. Calling it again changes nothing.

    What such a model does, and refuses with one sentence, in its forward pass:

    - It runs in one process and on whole weights. Experts that are split over processes, by
      transformers or as DTensors, are refused: that is what `shard_moe` is for.
    - Biases, transposed and interleaved weights, and experts without a gate are understood. Experts
      with a norm behind them, or quantized, are refused.
    - The module's gate is recognised by its values, once, at its first call. One that is neither
      SwiGLU nor GPT-OSS's clamped form runs as the module computes it with `grouped_mm`, and is
      refused by `triton`, which has it inside its kernels.
    """
    for backend in BACKENDS.values():
        if backend.serves_transformers:
            run = partial(_run_experts, backend)
            ALL_EXPERTS_FUNCTIONS.register(_PREFIX + backend.name, run)


def _run_experts(
    backend: Backend,
    module: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Be the forward pass of an experts module: (T, H), (T, K), (T, K) -> (T, H).

    As a linear layer does, it computes in the dtype of the tokens, or in that of autocast.
    """
    refuse = partial(_refuse, backend.name, module)
    device_type = hidden_states.device.type
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        run = _load(backend)
        experts = _read_weights(module, refuse).map_tensors(lambda tensor: tensor.to(dtype))
        if reason := _find_unsupported_reason(backend, experts, device_type):
            refuse(reason)
        order = sort_by_expert(top_k_index, len(experts.down_proj))
        output = run(hidden_states.to(dtype), order, top_k_weights, experts)
    return output.to(hidden_states.dtype)


def _load(backend: Backend) -> ExpertBackend:
    if not backend.is_installed():
        raise MissingKernelError(
            f'experts_implementation="{_PREFIX}{backend.name}" needs {backend.name}, which is not '
            f"installed; install it with: {backend.install}"
        )
    return backend.load(None)


def _read_weights(module: nn.Module, refuse: Callable[[str], None]) -> ExpertWeights:
    """Take the weights as they lie in a module, after checking that they are what they seem."""
    if getattr(module, "_is_expert_parallel", False):
        refuse("its experts are split over processes: use shard_moe for that")
    for flag, wanted in _FLAGS.items():
        if getattr(module, flag, wanted) != wanted:
            refuse(f"it has {flag}={not wanted}, and only {wanted} is supported")
    has_gate = getattr(module, "has_gate", True)
    names = ["gate_up_proj" if has_gate else "up_proj", "down_proj"]
    if getattr(module, "has_bias", False):
        names += [f"{name}_bias" for name in names]
    tensors = {name: getattr(module, name) for name in names}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            refuse(f"its {name} is split over processes (a DTensor): use shard_moe for that")
        if tensor.dtype not in _DTYPES:
            refuse(f"its {name} is {name_dtype(tensor.dtype)}, not float32, bfloat16 or float16")
    return ExpertWeights(
        tensors[names[0]],
        tensors["down_proj"],
        _find_gate(module),
        gate_up_bias=tensors.get(f"{names[0]}_bias"),
        down_bias=tensors.get("down_proj_bias"),
        is_transposed=getattr(module, "is_transposed", False),
        is_interleaved=not getattr(module, "is_concatenated", True),
        has_gate=has_gate,
    )


def _find_gate(module: nn.Module) -> Gate:
    """Return the module's gate; kept in the module, since comparing reads back to the host."""
    gate = getattr(module, _GATE_ATTRIBUTE, None)
    if gate is None:
        gate = _recognise_gate(module)
        setattr(module, _GATE_ATTRIBUTE, gate)
    return gate


def _recognise_gate(module: nn.Module) -> Gate:
    if not getattr(module, "has_gate", True):
        return recognise_gate(_find_activation(module), list_activations())
    if not isinstance(module, _HasGate):
        raise ConfigurationError(
            f"{type(module).__name__} has no _apply_gate: its gate cannot be recognised."
        )
    device = next(module.parameters()).device
    return recognise_gate(_OwnGate(module), list_gates(_list_numbers(module)), device)


def _find_activation(module: nn.Module) -> Gate:
    activation = getattr(module, "act_fn", None)
    if not callable(activation):
        raise ConfigurationError(
            f"{type(module).__name__} has no act_fn: its activation cannot be recognised."
        )
    return activation


def _list_numbers(module: nn.Module) -> Iterator[float]:
    """Yield every number that a module holds, under whatever name: its gate's are among them."""
    for value in (value for part in module.modules() for value in vars(part).values()):
        if isinstance(value, float | int) and not isinstance(value, bool):
            yield float(value)


@runtime_checkable
class _HasGate(Protocol):
    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _OwnGate:
    """Call a module's own `_apply_gate`, which splits what it is given."""

    module: "_HasGate"

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        if getattr(self.module, "is_concatenated", True):
            joined = torch.cat([gate, up], dim=-1)
        else:
            joined = torch.stack([gate, up], dim=-1).flatten(-2)
        return self.module._apply_gate(joined)


def _find_unsupported_reason(
    backend: Backend, experts: ExpertWeights, device_type: str
) -> str | None:
    """Say in a clause why a backend cannot run these experts, or return None."""
    down = experts.projections[1]
    _, hidden_size, intermediate_size = down.shape
    shapes = ExpertShapes(
        hidden_size, intermediate_size, down.dtype, device_type, gate=experts.gate
    )
    return backend.find_unsupported_reason(shapes, _read_device_facts(device_type))


@cache
def _read_device_facts(device_type: str) -> DeviceFacts:
    """Look once: it takes milliseconds, and a forward pass may take fewer."""
    return read_device_facts(device_type)


def _refuse(kernel: str, module: nn.Module, cause: str) -> NoReturn:
    raise ConfigurationError(
        f'experts_implementation="{_PREFIX}{kernel}" cannot run {type(module).__name__}: {cause}.'
    )
