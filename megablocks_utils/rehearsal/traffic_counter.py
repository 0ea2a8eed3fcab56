"""Count the bytes that this rank would send, by kind of collective and by receivers."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName

from megablocks_utils.planning.model.prediction import GroupTraffic, sum_traffic

__all__ = ["Route", "TrafficCounter", "sum_groups"]


class Route(NamedTuple):
    """Where bytes go.

    Attributes:
        kind: of collective.
        ranks: that share in it; of an all-to-all, this one and the one that receives.
        group: all ranks that share in the collective.
    """

    kind: str
    ranks: tuple[int, ...]
    group: tuple[int, ...]


def sum_groups(sent: Mapping[Route, int]) -> tuple[GroupTraffic, ...]:
    """Return bytes by kind of collective and form of group, whoever they go to."""
    parts = []
    for route, num_bytes in sent.items():
        ranks = sorted(route.group)
        stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        parts.append(GroupTraffic(route.kind, len(ranks), stride, num_bytes))
    return sum_traffic(parts)


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
        Route("all_to_all", (ranks[own], ranks[peer]), ranks): row_bytes * size
        for peer, size in enumerate(sizes)
        if peer != own
    }


def _count_all_gather(whole: Tensor, own: Tensor, group: Any, *_: Any) -> dict[Route, int]:
    return {_route("all_gather", group): _size(whole) - _size(own)}


def _count_all_gather_of_lists(
    wholes: list[list[Tensor]], owns: list[Tensor], group: Any, *_: Any
) -> dict[Route, int]:
    """Count FSDP1's on a CPU: a list of the shards of all ranks."""
    missing = sum(_size(t) for whole in wholes for t in whole) - sum(map(_size, owns))
    return {_route("all_gather", group): missing}


def _count_reduce_scatter(own: Tensor, whole: Tensor, group: Any, *_: Any) -> dict[Route, int]:
    return {_route("reduce_scatter", group): _size(whole) - _size(own)}


def _count_all_reduce(tensors: list[Tensor], group: Any, *_: Any) -> dict[Route, int]:
    route = _route("all_reduce", group)
    size = len(route.group)
    return {route: sum(map(_size, tensors)) * 2 * (size - 1) // size}


def _count_functional_all_gather(own: Tensor, size: int, group_name: GroupName) -> dict[Route, int]:
    return {_named_route("all_gather", group_name): (size - 1) * _size(own)}


def _count_functional_reduce_scatter(
    whole: Tensor, _: str, size: int, group_name: GroupName
) -> dict[Route, int]:
    return {_named_route("reduce_scatter", group_name): _size(whole) // size * (size - 1)}


def _count_functional_all_reduce(tensor: Tensor, _: str, group_name: GroupName) -> dict[Route, int]:
    route = _named_route("all_reduce", group_name)
    size = len(route.group)
    return {route: _size(tensor) * 2 * (size - 1) // size}


def _named_route(kind: str, group_name: GroupName) -> Route:
    ranks = _ranks(dist.distributed_c10d._resolve_process_group(group_name))
    return Route(kind, ranks, ranks)


def _route(kind: str, group: Any) -> Route:
    ranks = _ranks(dist.ProcessGroup.unbox(group))
    return Route(kind, ranks, ranks)


def _ranks(group: ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_COUNTED: dict[Any, Callable[..., dict[Route, int]]] = {
    torch.ops._c10d_functional.all_to_all_single.default: _count_all_to_all,
    torch.ops._c10d_functional.all_gather_into_tensor.default: _count_functional_all_gather,
    torch.ops._c10d_functional.reduce_scatter_tensor.default: _count_functional_reduce_scatter,
    torch.ops._c10d_functional.all_reduce.default: _count_functional_all_reduce,
    torch.ops._c10d_functional.all_reduce_.default: _count_functional_all_reduce,
    torch.ops.c10d._allgather_base_.default: _count_all_gather,
    torch.ops.c10d.allgather_.default: _count_all_gather_of_lists,
    torch.ops.c10d._reduce_scatter_base_.default: _count_reduce_scatter,
    torch.ops.c10d.allreduce_.default: _count_all_reduce,
}
