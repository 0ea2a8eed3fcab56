"""Agreement between ranks, on an error, a value or a number: the only place where ranks agree.

An action may raise a UserError on some ranks only; every rank then raises the error of the
lowest-numbered one of them. Any other exception is a defect and is not agreed on: it ends its rank
at once, and `monitor` ends the ranks that wait for it in the collective.

**Collective:** every function here must be called by every rank of `group` (None: the default
group), in the same order. What is agreed on travels over the CPU where the group has a backend for
it. Where torch.distributed is not initialised, or the group is one rank, nothing is sent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from megablocks_utils.errors import UserError

__all__ = [
    "broadcast_from_rank0",
    "gather_from_all_ranks",
    "max_over_ranks",
    "min_over_ranks",
    "raise_on_all_ranks",
    "sum_over_ranks",
]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Outcome(Generic[_Result]):
    """The result of an action on one rank, or its error."""

    results: tuple[_Result, ...]
    error: UserError | None

    def unwrap(self) -> _Result:
        if self.error is not None:
            raise self.error
        return self.results[0]


def raise_on_all_ranks(
    action: Callable[[], _Result], group: dist.ProcessGroup | None = None
) -> _Result:
    """Do something local on every rank; where it fails on one rank, raise the error on all.

    For what only some ranks can see, such as a file that one machine cannot read.

    **Collective:** one all-gather over `group`. An action with collectives of its own may fail on
    one rank only after them, or the others wait in one.

    Returns:
        What the action returned on this rank.

    Raises:
        UserError: on every rank, the error of the lowest-numbered failing rank.
    """
    outcome = _attempt(action)
    for error in _gather(outcome.error, group):
        if error is not None:
            raise error
    return outcome.unwrap()


def gather_from_all_ranks(
    action: Callable[[], _Result], group: dist.ProcessGroup | None = None
) -> list[_Result]:
    """Do something local on every rank; every rank returns all results, in order of rank.

    **Collective:** as `raise_on_all_ranks`. Results must be small, and pickle.

    Raises:
        UserError: as `raise_on_all_ranks`.
    """
    return [outcome.unwrap() for outcome in _gather(_attempt(action), group)]


def broadcast_from_rank0(
    action: Callable[[], _Result], group: dist.ProcessGroup | None = None
) -> _Result:
    """Do something on the group's first rank alone; every rank returns its result.

    For what ranks may see differently and must treat alike.

    **Collective:** one broadcast over `group`. The result must be small, and pickle.

    Raises:
        UserError: on every rank, the error of the first rank.
    """
    if _is_alone(group):
        return action()
    is_first = dist.get_rank(group) == 0
    # Elsewhere, what arrives takes the place of the empty one.
    first: list[_Outcome[_Result]] = [_attempt(action) if is_first else _Outcome((), None)]
    dist.broadcast_object_list(first, group=group, group_src=0)
    return first[0].unwrap()


def max_over_ranks(number: int, group: dist.ProcessGroup | None = None) -> int:
    """Return the largest of all ranks' numbers.

    **Collective:** one all-reduce of one number over `group`.
    """
    return _reduce(number, dist.ReduceOp.MAX, group)


def min_over_ranks(number: int, group: dist.ProcessGroup | None = None) -> int:
    """Return the smallest of all ranks' numbers.

    **Collective:** one all-reduce of one number over `group`.
    """
    return _reduce(number, dist.ReduceOp.MIN, group)


def sum_over_ranks(number: int, group: dist.ProcessGroup | None = None) -> int:
    """Return the sum of all ranks' numbers.

    **Collective:** one all-reduce of one number over `group`.
    """
    return _reduce(number, dist.ReduceOp.SUM, group)


def _is_alone(group: dist.ProcessGroup | None) -> bool:
    is_connected = dist.is_available() and dist.is_initialized()
    return not is_connected or dist.get_world_size(group) == 1


def _attempt(action: Callable[[], _Result]) -> _Outcome[_Result]:
    try:
        return _Outcome((action(),), None)
    except UserError as error:
        return _Outcome((), error)


def _gather(value: _Result, group: dist.ProcessGroup | None) -> list[_Result]:
    if _is_alone(group):
        return [value]
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _reduce(
    number: int, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> int:
    if _is_alone(group):
        return number
    reduced = torch.tensor(number, dtype=torch.int64, device=_device(group))
    dist.all_reduce(reduced, op=operation, group=group)
    return int(reduced.item())


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Return the CPU, or this rank's GPU where a caller's group has only NCCL."""
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
