"""Run the experts of any transformers model on this project's kernels: one process, no sharding.

transformers hands each experts module to the function that its `experts_implementation` names.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from megablocks_utils.errors import ConfigurationError, MissingKernelError
from megablocks_utils.kernels.backends.backend import Backend, ExpertBackend
from megablocks_utils.kernels.backends.backend_table import BACKENDS
from megablocks_utils.kernels.device import DeviceFacts, read_device_facts
from megablocks_utils.kernels.fused.unpermute import fused_unpermute_and_combine
from megablocks_utils.kernels.permute import (
    permute_tokens,
    sort_by_expert,
)
from megablocks_utils.kernels.shapes import name_dtype
from megablocks_utils.kernels.weights import ExpertWeights
from megablocks_utils.moe.expert_spec import ExpertSpec, read_expert_spec
from megablocks_utils.moe.expert_use import ExpertUse

__all__ = ["register_experts_implementation"]

_PREFIX = "megablocks_utils_"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SPEC_ATTRIBUTE = "_megablocks_utils_spec"


def register_experts_implementation() -> None:
    """Let every transformers model take this project's kernels for its experts.

    After it, `experts_implementation` may be `"megablocks_utils_triton"` or
    `"megablocks_utils_grouped_mm"` in `from_pretrained`, `from_config` and
    `set_experts_implementation`. Calling it again changes nothing.

    What such a model does, and refuses with one sentence, in its forward pass:

    - It runs in one process and on whole weights. Experts that are split over processes, by
      transformers or as DTensors, are refused: that is what `shard_moe` is for.
    - Biases, transposed and interleaved weights, experts without a gate and a norm behind the
      experts are understood. Quantized experts are refused.
    - The module's gate is recognised by its values, once, at its first call. One that the kernels
      do not know runs as the module computes it with `grouped_mm`, and is refused by `triton`,
      which has it inside its kernels.
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
        if getattr(module, "_is_expert_parallel", False):
            refuse("its experts are split over processes: use shard_moe for that")
        spec = _read_spec(module)
        experts = _read_weights(module, spec, refuse).map_tensors(lambda tensor: tensor.to(dtype))
        if reason := _find_unsupported_reason(backend, spec, dtype, device_type):
            refuse(reason)
        tokens, order = hidden_states.to(dtype), sort_by_expert(top_k_index, spec.num_experts)
        if not spec.has_post_norm:
            return run(tokens, order, top_k_weights, experts).to(hidden_states.dtype)
        rows = run(permute_tokens(tokens, order), order.of_sorted_rows(), None, experts)
        rows = module.get_submodule("post_expert_norm")(rows)
        return fused_unpermute_and_combine(rows, top_k_weights, order).to(hidden_states.dtype)


def _load(backend: Backend) -> ExpertBackend:
    if not backend.is_installed():
        raise MissingKernelError(
            f'experts_implementation="{_PREFIX}{backend.name}" needs {backend.name}, which is not '
            f"installed; install it with: {backend.install}"
        )
    return backend.load(None)


def _read_spec(module: nn.Module) -> ExpertSpec:
    """Return what the experts are; kept in the module, since it takes milliseconds to find out."""
    spec = getattr(module, _SPEC_ATTRIBUTE, None)
    if spec is None:
        spec = read_expert_spec(module)
        setattr(module, _SPEC_ATTRIBUTE, spec)
    return spec


def _read_weights(
    module: nn.Module, spec: ExpertSpec, refuse: Callable[[str], None]
) -> ExpertWeights:
    """Take the weights as they lie in a module, after checking that they are what they seem."""
    tensors = {name: getattr(module, name) for name in spec.parameter_names}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            refuse(f"its {name} is split over processes (a DTensor): use shard_moe for that")
        if tensor.dtype not in _DTYPES:
            refuse(f"its {name} is {name_dtype(tensor.dtype)}, not float32, bfloat16 or float16")
    return spec.build_weights(tensors)


def _find_unsupported_reason(
    backend: Backend, spec: ExpertSpec, dtype: torch.dtype, device_type: str
) -> str | None:
    """Say in a clause why a backend cannot run these experts, or return None."""
    use = ExpertUse(device_type, None, "full", None)
    shapes = use.shapes(spec, dtype, None, ep_size=1)
    return backend.find_unsupported_reason(shapes, _read_device_facts(device_type))


@cache
def _read_device_facts(device_type: str) -> DeviceFacts:
    """Look once: it takes milliseconds, and a forward pass may take fewer."""
    return read_device_facts(device_type)


def _refuse(kernel: str, module: nn.Module, cause: str) -> NoReturn:
    raise ConfigurationError(
        f'experts_implementation="{_PREFIX}{kernel}" cannot run {type(module).__name__}: {cause}.'
    )
