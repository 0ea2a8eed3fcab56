"""Bugs of tensor parallelism, for `planted_bugs`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any
from unittest import mock

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.integrations.tensor_parallel import ColwiseParallel

from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.fsdp import gradients, tensor_parallel
from megablocks_utils.mesh import token_split
from megablocks_utils.mesh.dense_mesh import TP_AXIS
from megablocks_utils.training import loop

__all__ = ["TP_BUGS"]

_TINY_SLICES = {"k_proj.weight": (0, 16), "o_proj.weight": (1, 32)}
"""Of attention on two ranks: the dim that is cut, and how long a slice is."""


def swap_slices(projection: str) -> Any:
    """Give each rank of a tp group the other's slice of a projection."""
    own = SliceReader.fill_local
    cut, length = _TINY_SLICES[projection]

    def fill(reader: SliceReader, name: str, local: Tensor, offsets: tuple[int, ...]) -> None:
        if name.endswith(projection):
            moved = (offsets[cut] + length) % (2 * length)
            offsets = (*offsets[:cut], moved, *offsets[cut + 1 :])
        own(reader, name, local, offsets)

    return mock.patch.object(SliceReader, "fill_local", fill)


def keep_own_rows() -> Any:
    """Leave out of the gradient of experts' inputs, and of routers, what other ranks' rows give."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        whole = grad.new_zeros(ctx.num_rows, *grad.shape[1:])
        whole[ctx.split.own_rows(ctx.num_rows)] = grad
        return whole, None

    return mock.patch.object(token_split._Take, "backward", staticmethod(backward))


def average_inputs() -> Any:
    """Average over the ranks, and not sum, the gradients of what split layers take."""
    own = ColwiseParallel.transform_inputs_pre_forward

    def transform(style: Any, module: Any, args: tuple, kwargs: dict, mesh: Any) -> Any:
        x = args[0] / 2 + args[0].detach() / 2
        return own(style, module, (x, *args[1:]), kwargs, mesh)

    return mock.patch.object(ColwiseParallel, "transform_inputs_pre_forward", transform)


def count_copies_twice() -> Any:
    """Count in the global norm each rank's copy of what tensor parallelism leaves whole."""
    own = gradients.count_replicas

    def count(tensor: Tensor, world_size: int) -> int:
        replicas = own(tensor, world_size)
        names = tensor.device_mesh.mesh_dim_names or () if isinstance(tensor, DTensor) else ()
        return replicas if TP_AXIS in names else max(1, replicas // 2)

    return mock.patch.object(gradients, "count_replicas", count)


def sum_norms_twice() -> Any:
    """Sum the gradients of norms of heads once more over the ranks."""
    own = tensor_parallel.sum_gradient_over

    def twice(tensor: Tensor, group: Any) -> Tensor:
        return own(own(tensor, group), group)

    return mock.patch.object(tensor_parallel, "sum_gradient_over", twice)


def leave_norms(*, checked: bool) -> Any:
    """Leave each rank the gradients of norms of its own heads."""
    unsummed = mock.patch.object(tensor_parallel, "sum_gradient_over", lambda tensor, _: tensor)
    if checked:
        return unsummed
    blind = mock.patch.object(loop, "check_gradients_beside_tp", lambda *_: None)
    return _Both(unsummed, blind)


class _Both:
    """Two patches at once."""

    def __init__(self, *patches: Any) -> None:
        self._patches = patches

    def __enter__(self) -> None:
        for patch in self._patches:
            patch.__enter__()

    def __exit__(self, *error: object) -> None:
        for patch in reversed(self._patches):
            patch.__exit__(*error)


TP_BUGS: Mapping[str, tuple[str, Callable[[], Any]]] = MappingProxyType(
    {
        "tp: KV split wrong": ("qwen3_moe", lambda: swap_slices("k_proj.weight")),
        "tp: slices swapped": ("qwen3_moe", lambda: swap_slices("o_proj.weight")),
        "tp: gradient of experts' inputs not joined": ("qwen3_moe", keep_own_rows),
        "tp: gradient of split layers' inputs averaged": ("glm4_moe", average_inputs),
        "tp: copies count twice in the norm": ("qwen3_moe", count_copies_twice),
        "tp: norms of heads summed twice": ("qwen3_moe", sum_norms_twice),
        "tp: norms of heads not summed": ("qwen3_moe", lambda: leave_norms(checked=False)),
        "tp: the same, checked": ("qwen3_moe", lambda: leave_norms(checked=True)),
    }
)
"""By name: a family that must show it at tp 2, and what plants it."""
