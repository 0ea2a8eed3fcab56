"""Count the bytes that this rank would send, by kind of collective and by receivers."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName

__all__ = ["Route", "TrafficCounter", "sum_kinds"]


class Route(NamedTuple):
    """Where bytes go.

    Attributes:
        kind: of collective.
        ranks: that share in it; of an all-to-all, this one and the one that receives.
    """

    kind: str
    ranks: tuple[int, ...]


def sum_kinds(sent: Iterable[tuple[Route, int]]) -> Counter[str]:
    """Return bytes by kind of collective, whoever they go to."""
    total: Counter[str] = Counter()
    for route, num_bytes in sent:
        total[route.kind] += num_bytes
    return total


class TrafficCounter:
    """Count what operators send.

    Attributes:
        sent: bytes by route, as `planning.model.prediction.Prediction` defines them. Exchanges of
            counts are part of `all_to_all`.
    """

    def __init__(self) -> None:
        self.sent: Counter[Route] = Counter()

    def count(self, func: Any, args: tuple) -> None:
        """Count what an operator sends, given its arguments."""
        count = _COUNTED.get(func)
        if count is not None:
            self.sent.update(count(*args))

    def take(self) -> Counter[Route]:
        """Return what was counted, and start again at 0."""
        taken, self.sent = self.sent, Counter()
        return taken


def _count_all_to_all(
    rows: Tensor, _: Any, input_sizes: list[int], group_name: GroupName
) -> dict[Route, int]:
    group = dist.distributed_c10d._resolve_process_group(group_name)
    ranks, own = _ranks(group), group.rank()
    sizes = input_sizes or [len(rows) // len(ranks)] * len(ranks)
    row_bytes = _size(rows) // max(1, len(rows))
    return {
        Route("all_to_all", (ranks[own], ranks[peer])): row_bytes * size
        for peer, size in enumerate(sizes)
        if peer != own
    }


def _count_all_gather(whole: Tensor, own: Tensor, group: Any, *_: Any) -> dict[Route, int]:
    return {Route("all_gather", _unboxed_ranks(group)): _size(whole) - _size(own)}


def _count_all_gather_of_lists(
    wholes: list[list[Tensor]], owns: list[Tensor], group: Any, *_: Any
) -> dict[Route, int]:
    """Count FSDP1's on a CPU: a list of the shards of all ranks."""
    missing = sum(_size(t) for whole in wholes for t in whole) - sum(map(_size, owns))
    return {Route("all_gather", _unboxed_ranks(group)): missing}


def _count_reduce_scatter(own: Tensor, whole: Tensor, group: Any, *_: Any) -> dict[Route, int]:
    return {Route("reduce_scatter", _unboxed_ranks(group)): _size(whole) - _size(own)}


def _count_all_reduce(tensors: list[Tensor], group: Any, *_: Any) -> dict[Route, int]:
    ranks = _unboxed_ranks(group)
    sent = sum(map(_size, tensors)) * 2 * (len(ranks) - 1) // len(ranks)
    return {Route("all_reduce", ranks): sent}


def _unboxed_ranks(group: Any) -> tuple[int, ...]:
    return _ranks(dist.ProcessGroup.unbox(group))


def _ranks(group: ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_COUNTED: dict[Any, Callable[..., dict[Route, int]]] = {
    torch.ops._c10d_functional.all_to_all_single.default: _count_all_to_all,
    torch.ops.c10d._allgather_base_.default: _count_all_gather,
    torch.ops.c10d.allgather_.default: _count_all_gather_of_lists,
    torch.ops.c10d._reduce_scatter_base_.default: _count_reduce_scatter,
    torch.ops.c10d.allreduce_.default: _count_all_reduce,
}
