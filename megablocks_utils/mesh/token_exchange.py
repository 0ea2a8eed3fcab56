"""Send tokens to the ranks that hold their experts, and their results back.

Dropless: every routed row travels, in buffers of exactly the needed size. A layer makes one small
all-to-all of counts, reads the split sizes back to the host once, then makes one all-to-all of rows
on the way out (`dispatch`) and one on the way back (`combine`); the backward pass makes the two
row exchanges again in the other direction.

Every rank of the ep group must enter every exchange, also with no row to send.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class DispatchPlan:
    """Split sizes of one layer's exchange, on the host, and the order its rows are computed in.

    `send_sizes` and `receive_sizes` count rows per rank of the ep group. `tokens_per_expert (L,)`
    counts, on the device, the received rows of each local expert. `expert_major (R,)` lists the
    received rows by local expert, and `rank_major (R,)` undoes it; both are None where the rows
    arrive in that order.
    """

    send_sizes: list[int]
    receive_sizes: list[int]
    tokens_per_expert: Tensor
    expert_major: Tensor | None
    rank_major: Tensor | None


@dataclass(frozen=True)
class ExchangedCounts:
    """Who sends how many rows to whom.

    `received (ep_size, L)` counts, on the device, the rows that each rank of the group sends to
    each expert here; `send_sizes` and `receive_sizes` are rows per rank of the group, on the host.
    """

    received: Tensor
    send_sizes: list[int]
    receive_sizes: list[int]


ExchangeCounts = Callable[[Tensor, ProcessGroup, int], ExchangedCounts]


def exchange_counts(
    tokens_per_expert: Tensor, group: ProcessGroup, ep_size: int
) -> ExchangedCounts:
    """Tell every rank of the group how many rows it will get.

    **Collective:** one all-to-all of E integers on the ep group, then the layer's one host read.

    Args:
        tokens_per_expert: (E,) int64, this rank's rows for every expert of the layer.
        group: the ep group.
        ep_size: its size.
    """
    # The functional collective, not `dist.all_to_all_single`: selective checkpointing keeps the
    # result of an op, and would keep garbage of one that fills its output in place.
    received = exchange_rows(tokens_per_expert, None, None, group).view(ep_size, -1)
    send_sizes = tokens_per_expert.view(ep_size, -1).sum(dim=1)
    return ExchangedCounts(received, *torch.stack([send_sizes, received.sum(dim=1)]).tolist())


def plan_dispatch(counts: ExchangedCounts) -> DispatchPlan:
    """Work out how the rows of one layer travel and in which order they are computed."""
    received = counts.received
    expert_major = rank_major = None
    if received.shape[1] > 1:
        expert_major = expert_major_order(received, sum(counts.receive_sizes))
        rank_major = invert_permutation(expert_major)
    return DispatchPlan(
        send_sizes=counts.send_sizes,
        receive_sizes=counts.receive_sizes,
        tokens_per_expert=received.sum(dim=0),
        expert_major=expert_major,
        rank_major=rank_major,
    )


def dispatch_rows(rows: Tensor, plan: DispatchPlan, group: ProcessGroup) -> Tensor:
    """Send rows (N, H), sorted by expert, to their experts' ranks; returns (R, H), by sender.

    **Collective:** one all-to-all on the ep group, and one more in backward.
    """
    return _AllToAll.apply(rows, plan.receive_sizes, plan.send_sizes, group)


def combine_rows(rows: Tensor, plan: DispatchPlan, group: ProcessGroup) -> Tensor:
    """Send results (R, H), in the order received, back to the senders; returns (N, H).

    **Collective:** one all-to-all on the ep group, and one more in backward.
    """
    return _AllToAll.apply(rows, plan.send_sizes, plan.receive_sizes, group)


def invert_permutation(permutation: Tensor) -> Tensor:
    """Return the permutation that undoes a permutation (N,)."""
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.numel(), device=permutation.device)
    return inverse


def expert_major_order(received: Tensor, num_rows: int) -> Tensor:
    """List rows that arrived as [sender][expert] in the order [expert][sender].

    Each (expert, sender) segment keeps its rows' order; `received (ep_size, L)` are the counts.
    """
    flat = received.reshape(-1)
    starts = (flat.cumsum(0) - flat).view_as(received).t().reshape(-1)
    lengths = received.t().reshape(-1)
    shift = starts - (lengths.cumsum(0) - lengths)
    positions = torch.arange(num_rows, device=received.device)
    return positions + shift.repeat_interleave(lengths, output_size=num_rows)


def exchange_rows(
    rows: Tensor,
    output_sizes: list[int] | None,
    input_sizes: list[int] | None,
    group: ProcessGroup,
) -> Tensor:
    """Make one all-to-all; without sizes, equal shares. Not differentiable.

    **Collective:** on `group`.
    """
    pending = functional_collectives.all_to_all_single(rows, output_sizes, input_sizes, group)
    return functional_collectives.wait_tensor(pending)


class _AllToAll(torch.autograd.Function):
    """All-to-all of rows; the gradient travels the same way back.

    Our own function because torch made the functional collective differentiable only in 2.13.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        output_sizes: list[int],
        input_sizes: list[int],
        group: ProcessGroup,
    ) -> Tensor:
        ctx.sizes = output_sizes, input_sizes
        ctx.group = group
        return exchange_rows(rows.contiguous(), output_sizes, input_sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output_sizes, input_sizes = ctx.sizes
        return (
            exchange_rows(grad.contiguous(), input_sizes, output_sizes, ctx.group),
            None,
            None,
            None,
        )
