"""Count the bytes that this rank would send, by kind of collective."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TrafficCounter"]


class TrafficCounter(TorchDispatchMode):
    """Count while entered.

    Attributes:
        sent: bytes by kind, as `planning.model.prediction.Prediction` defines them. Exchanges of
            counts are part of `all_to_all`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare each operator the guard against torch.compile, which a rehearsal never uses."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        count = _COUNTED.get(func)
        if count is not None:
            kind, num_bytes = count(*args)
            self.sent[kind] += num_bytes
        return func(*args, **(kwargs or {}))

    def take(self) -> Counter[str]:
        """Return what was counted, and start again at 0."""
        taken, self.sent = self.sent, Counter()
        return taken


def _count_all_to_all(
    rows: Tensor, _: Any, input_sizes: list[int], group_name: GroupName
) -> tuple[str, int]:
    group = dist.distributed_c10d._resolve_process_group(group_name)
    stay = input_sizes[group.rank()] if input_sizes else len(rows) // group.size()
    return "all_to_all", _size(rows) // max(1, len(rows)) * (len(rows) - stay)


def _count_all_gather(whole: Tensor, own: Tensor, *_: Any) -> tuple[str, int]:
    return "all_gather", _size(whole) - _size(own)


def _count_all_gather_of_lists(
    wholes: list[list[Tensor]], owns: list[Tensor], *_: Any
) -> tuple[str, int]:
    """Count FSDP1's on a CPU: a list of the shards of all ranks."""
    return "all_gather", sum(_size(t) for whole in wholes for t in whole) - sum(map(_size, owns))


def _count_reduce_scatter(own: Tensor, whole: Tensor, *_: Any) -> tuple[str, int]:
    return "reduce_scatter", _size(whole) - _size(own)


def _count_all_reduce(tensors: list[Tensor], group: Any, *_: Any) -> tuple[str, int]:
    size = dist.ProcessGroup.unbox(group).size()
    return "all_reduce", sum(map(_size, tensors)) * 2 * (size - 1) // size


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_COUNTED: dict[Any, Callable[..., tuple[str, int]]] = {
    torch.ops._c10d_functional.all_to_all_single.default: _count_all_to_all,
    torch.ops.c10d._allgather_base_.default: _count_all_gather,
    torch.ops.c10d.allgather_.default: _count_all_gather_of_lists,
    torch.ops.c10d._reduce_scatter_base_.default: _count_reduce_scatter,
    torch.ops.c10d.allreduce_.default: _count_all_reduce,
}
