"""Rows to and from the slices of their experts, where `expert_tp` splits each expert.

On the way out a rank gathers the rows of its peers, which hold the other slices of the same
experts; what each slice makes of a row is a part of a sum, and the rank that brought the row sums
the parts on the way back. The backward pass does the same in the other direction.

Both are all-to-alls: ranks bring different numbers of rows, and parts in bf16 are summed in fp32.

Every rank of the group must enter every exchange, also without rows. Legend: M rows that came to
this rank, R rows of all peers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megablocks_utils.mesh.recomputation import keep_rows
from megablocks_utils.mesh.token_exchange import DispatchPlan, PeerGroup, exchange_rows

__all__ = ["combine_from_peers", "dispatch_to_peers"]

_Way = Callable[[Tensor], Tensor]


def dispatch_to_peers(
    rows: Tensor, plan: DispatchPlan, group: ProcessGroup, peers: PeerGroup
) -> Tensor:
    """Send rows (N, H), sorted by expert, to all slices of their experts: (R, H), by peer, sender.

    **Collective:** one all-to-all on the ep group (none if it is one rank) and one on the peers',
    and one more each in backward.
    """
    there, back = _ways(plan, group, peers)
    return _Exchange.apply(rows, there, back)


def combine_from_peers(
    rows: Tensor, plan: DispatchPlan, group: ProcessGroup, peers: PeerGroup
) -> Tensor:
    """Sum what the slices made of each row, (R, H) in the order received, and send it back: (N, H).

    **Collective:** as `dispatch_to_peers`.
    """
    there, back = _ways(plan, group, peers)
    return _Exchange.apply(rows, back, there)


def _ways(plan: DispatchPlan, group: ProcessGroup, peers: PeerGroup) -> tuple[_Way, _Way]:
    """Return how rows go to the slices of their experts, and how sums come back."""

    def send(rows: Tensor) -> Tensor:
        rows = _exchange(rows, plan.receive_sizes, plan.send_sizes, group)
        return _gather(rows, sizes, peers)

    def return_sums(rows: Tensor) -> Tensor:
        rows = _sum_own(rows, sizes, peers)
        return _exchange(rows, plan.send_sizes, plan.receive_sizes, group)

    assert plan.peer_sizes is not None, plan
    sizes = plan.peer_sizes
    return send, return_sums


def _exchange(
    rows: Tensor, output_sizes: list[int], input_sizes: list[int], group: ProcessGroup
) -> Tensor:
    if len(output_sizes) == 1:
        return rows
    return exchange_rows(rows, output_sizes, input_sizes, group)


def _gather(rows: Tensor, sizes: Sequence[int], peers: PeerGroup) -> Tensor:
    """Return the rows of all peers (R, H) to each: all-gather of any sizes."""
    sent = rows.repeat(peers.size, 1)
    return exchange_rows(sent, list(sizes), [len(rows)] * peers.size, peers.group)


def _sum_own(rows: Tensor, sizes: Sequence[int], peers: PeerGroup) -> Tensor:
    """Return the sums over all peers of this rank's rows (M, H): reduce-scatter of any sizes."""
    num_own = sizes[peers.rank]
    parts = exchange_rows(rows, [num_own] * peers.size, list(sizes), peers.group)
    parts = parts.view(peers.size, num_own, rows.shape[1])
    return parts.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)


class _Exchange(torch.autograd.Function):
    """Both parts of a way as one: a checkpointed layer keeps the rows at their end alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: _Way, back: _Way) -> Tensor:
        ctx.back = back
        return keep_rows(lambda: there(rows.contiguous()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grad.contiguous()), None, None
