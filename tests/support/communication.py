"""Count the collectives of a piece of a run, and the bytes of this rank that they move."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megablocks_utils.rehearsal.traffic_counter import TrafficCounter


class CommunicationCounter(TorchDispatchMode):
    """Count while it is entered; autograd on a CPU runs in the same thread and is seen too.

    Attributes:
        calls: by kind, collectives entered.
        num_bytes: by kind: all-to-all, what leaves this rank, of counts, rows (also of tokens), or
            routing (places and weights, or gradients of weights); all-gather, what it receives from
            others; reduce-scatter, what it gives to others; all-reduce, the size of the tensors.
        by_group: what this rank sends, by collective and by the ranks that share in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self.by_group = TrafficCounter()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.by_group.count(func, args)
        if func in _COUNTED:
            kind, num_bytes = _COUNTED[func](*args)
            self.calls[kind] += 1
            self.num_bytes[kind] += num_bytes
        return func(*args, **(kwargs or {}))


def _count_all_to_all(
    rows: Tensor, _: list[int], input_sizes: list[int], group_name: str
) -> tuple[str, int]:
    group = dist.distributed_c10d._resolve_process_group(group_name)
    if rows.dim() == 1:
        return "all_to_all of counts", _size(rows) * (group.size() - 1) // group.size()
    num_rows = sum(input_sizes) - input_sizes[group.rank()]
    kind = "routing" if rows.shape[1] <= 2 else "rows"
    return f"all_to_all of {kind}", num_rows * rows.shape[1] * rows.element_size()


def _count_all_gather(whole: Tensor, own: Tensor, *_: Any) -> tuple[str, int]:
    return "all_gather", _size(whole) - _size(own)


def _count_all_gather_list(
    parts: list[list[Tensor]], own: list[Tensor], *_: Any
) -> tuple[str, int]:
    """Count what FSDP1 calls on a CPU: a tensor for each rank."""
    return "all_gather", sum(map(_size, parts[0])) - _size(own[0])


def _count_reduce_scatter(own: Tensor, whole: Tensor, *_: Any) -> tuple[str, int]:
    return "reduce_scatter", _size(whole) - _size(own)


def _count_all_reduce(tensors: list[Tensor], *_: Any) -> tuple[str, int]:
    return "all_reduce", sum(map(_size, tensors))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_COUNTED = {
    torch.ops._c10d_functional.all_to_all_single.default: _count_all_to_all,
    torch.ops.c10d._allgather_base_.default: _count_all_gather,
    torch.ops.c10d.allgather_.default: _count_all_gather_list,
    torch.ops.c10d._reduce_scatter_base_.default: _count_reduce_scatter,
    torch.ops.c10d.allreduce_.default: _count_all_reduce,
}
