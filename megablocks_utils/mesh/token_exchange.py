"""Send tokens to the ranks that hold their experts, and their results back.

Dropless: every routed row travels, in buffers of exactly the needed size. A layer starts one small
all-to-all of counts, reads the split sizes back to the host once while rows are sorted, then makes
one all-to-all of rows on the way out (`dispatch`) and one on the way back (`combine`); the backward
pass makes the two row exchanges again in the other direction.

Every rank of the ep group must enter every exchange, also with no row to send.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor
from torch.distributed import ProcessGroup

from megablocks_utils.mesh.recomputation import keep_rows


@dataclass(frozen=True)
class SplitSizes:
    """Rows that go to and come from each rank of the ep group; on the host."""

    send_sizes: list[int]
    receive_sizes: list[int]


@dataclass(frozen=True)
class PeerGroup:
    """The ranks with all slices of this rank's experts; how many, and which this one is."""

    group: ProcessGroup
    size: int
    rank: int


@dataclass(frozen=True)
class DispatchPlan(SplitSizes):
    """Split sizes of one layer's exchange, and the order its rows are computed in.

    `tokens_per_expert (L,)` counts, on the device, the received rows of each local expert.
    `expert_major (R,)` lists the received rows by local expert, and `rank_major (R,)` undoes it;
    both are None where the rows arrive in that order. `peer_sizes` are rows of each peer, which all
    of them get; None without peers.
    """

    tokens_per_expert: Tensor
    expert_major: Tensor | None
    rank_major: Tensor | None
    peer_sizes: list[int] | None = None


@dataclass(frozen=True)
class TokenSizes(SplitSizes):
    """Tokens, not rows, that go to and come from each rank; `received (ep_size,)` on the device."""

    received: Tensor


@dataclass(frozen=True)
class ExchangedCounts(SplitSizes):
    """Who sends how many rows to whom.

    `received (ep_size, L)` counts, on the device, the rows that each rank of the group has for each
    expert here; `tokens` says of how many tokens they are, where a token travels once to a rank.
    With peers, `received (peers * ep_size, L)` counts what each of these got, and `peer_sizes` sums
    that of each.
    """

    received: Tensor
    tokens: TokenSizes | None = None
    peer_sizes: list[int] | None = None


class PendingCounts:
    """Counts that are on their way."""

    def __init__(self, read: Callable[[], ExchangedCounts]) -> None:
        """Take what waits for them: it is called once at most."""
        self._read: Callable[[], ExchangedCounts] | None = read
        self._counts: ExchangedCounts | None = None

    def wait(self) -> ExchangedCounts:
        """Return them; the first call makes the layer's one host read."""
        if self._read is not None:
            self._counts, self._read = self._read(), None
        assert self._counts is not None
        return self._counts


ExchangeCounts = Callable[
    [Tensor, Tensor | None, ProcessGroup, int, PeerGroup | None], PendingCounts
]


def exchange_counts(
    tokens_per_expert: Tensor,
    tokens_per_rank: Tensor | None,
    group: ProcessGroup,
    ep_size: int,
    peers: PeerGroup | None = None,
) -> PendingCounts:
    """Begin to tell every rank of the group how many rows it will get.

    What is launched between this call and `wait` runs while the counts travel.

    **Collective:** one all-to-all of E integers on the ep group; where tokens travel once to a
    rank, of E + ep_size. With peers, one of E integers to each on their group.

    Args:
        tokens_per_expert: (E,) int64, this rank's rows for every expert of the layer.
        tokens_per_rank: (ep_size,) int64, the tokens that they are of; None where rows travel.
        group: the ep group.
        ep_size: its size.
        peers: who holds the other slices of these experts; rows travel, not tokens.
    """
    assert peers is None or tokens_per_rank is None, peers
    sent = tokens_per_expert.view(ep_size, -1)
    if tokens_per_rank is not None:
        sent = torch.cat([sent, tokens_per_rank.unsqueeze(1)], dim=1)
    pending = functional_collectives.all_to_all_single(sent.view(-1), None, None, group)
    receive = partial(_receive_counts, sent, pending, has_tokens=tokens_per_rank is not None)
    read = _read_counts
    if peers is not None:
        receive = partial(_gather_counts, receive, peers)
        read = partial(_read_gathered_counts, peers=peers)
    if sent.is_cuda:
        return PendingCounts(_copy_to_host(receive, read, sent.device))
    return PendingCounts(lambda: read(*receive()))


def _receive_counts(sent: Tensor, pending: Tensor, *, has_tokens: bool) -> tuple[Tensor, Tensor]:
    """Return the counts (ep_size, L) that came, and rows sent to and from each rank (2, ep_size).

    With tokens the counts have one more column, and their numbers follow those of the rows.

    `sent` are the counts that left.
    """
    received = functional_collectives.wait_tensor(pending).view_as(sent)
    both = torch.stack([sent, received])
    if not has_tokens:
        return received, both.sum(dim=2)
    return received, torch.cat([both[..., :-1].sum(dim=2), both[..., -1]])


def _gather_counts(
    receive: Callable[[], tuple[Tensor, Tensor]], peers: PeerGroup
) -> tuple[Tensor, Tensor]:
    """Return counts of all peers (peers * ep_size, L), and all sizes in a row, peers' last."""
    received, sizes = receive()
    gathered = exchange_rows(received.repeat(peers.size, 1), None, None, peers.group)
    of_peers = gathered.view(peers.size, -1).sum(dim=1)
    return gathered, torch.cat([sizes.view(-1), of_peers])


def _copy_to_host(
    receive: Callable[[], tuple[Tensor, Tensor]],
    read_counts: Callable[[Tensor, Tensor], ExchangedCounts],
    device: torch.device,
) -> Callable[[], ExchangedCounts]:
    """Have a GPU copy the sizes to the host once they are there; return what waits for that.

    On a stream of its own: the sorting of rows, which is launched next, waits for no other rank.
    """
    stream = _counts_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        received, sizes = receive()
        on_host = sizes.to("cpu", non_blocking=True)  # pinned
        copied = stream.record_event()

    def read() -> ExchangedCounts:
        # The host's wait is also what lets the memory of both streams be used again.
        copied.synchronize()
        torch.cuda.current_stream(device).wait_event(copied)
        return read_counts(received, on_host)

    return read


@cache
def _counts_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _read_counts(received: Tensor, sizes: Tensor) -> ExchangedCounts:
    send_rows, receive_rows, *tokens = sizes.tolist()
    if not tokens:
        return ExchangedCounts(send_rows, receive_rows, received)
    send_tokens, receive_tokens = tokens
    of_tokens = TokenSizes(send_tokens, receive_tokens, received[:, -1])
    return ExchangedCounts(send_rows, receive_rows, received[:, :-1], of_tokens)


def _read_gathered_counts(gathered: Tensor, sizes: Tensor, *, peers: PeerGroup) -> ExchangedCounts:
    numbers = sizes.tolist()
    ep_size = len(gathered) // peers.size
    send, receive = numbers[:ep_size], numbers[ep_size : 2 * ep_size]
    return ExchangedCounts(send, receive, gathered, peer_sizes=numbers[2 * ep_size :])


def plan_dispatch(counts: ExchangedCounts) -> DispatchPlan:
    """Work out how the rows of one layer travel and in which order they are computed."""
    received = counts.received
    expert_major = rank_major = None
    if received.shape[1] > 1:
        expert_major = expert_major_order(received, sum(counts.peer_sizes or counts.receive_sizes))
        rank_major = invert_permutation(expert_major)
    return DispatchPlan(
        send_sizes=counts.send_sizes,
        receive_sizes=counts.receive_sizes,
        tokens_per_expert=received.sum(dim=0),
        expert_major=expert_major,
        rank_major=rank_major,
        peer_sizes=counts.peer_sizes,
    )


def dispatch_rows(rows: Tensor, sizes: SplitSizes, group: ProcessGroup) -> Tensor:
    """Send rows (N, H), sorted by expert, to their experts' ranks; returns (R, H), by sender.

    **Collective:** one all-to-all on the ep group, and one more in backward.
    """
    return _AllToAll.apply(rows, sizes.receive_sizes, sizes.send_sizes, group)


def combine_rows(rows: Tensor, sizes: SplitSizes, group: ProcessGroup) -> Tensor:
    """Send results (R, H), in the order received, back to the senders; returns (N, H).

    **Collective:** one all-to-all on the ep group, and one more in backward.
    """
    return _AllToAll.apply(rows, sizes.send_sizes, sizes.receive_sizes, group)


def invert_permutation(permutation: Tensor) -> Tensor:
    """Return the permutation that undoes a permutation (N,)."""
    places = torch.arange(permutation.numel(), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, places)


def expert_major_order(received: Tensor, num_rows: int) -> Tensor:
    """List rows that arrived as [sender][expert] in the order [expert][sender].

    Each (expert, sender) segment keeps its rows' order; `received (ep_size, L)` are the counts.
    """
    lengths = received.t().reshape(-1)
    # Of segments in both orders; what they begin at differs by as much as what they end at.
    ends = received.reshape(-1).cumsum(0).view_as(received).t().reshape(-1)
    shift = ends - lengths.cumsum(0)
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
        return keep_rows(lambda: exchange_rows(rows.contiguous(), output_sizes, input_sizes, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output_sizes, input_sizes = ctx.sizes
        return (
            exchange_rows(grad.contiguous(), input_sizes, output_sizes, ctx.group),
            None,
            None,
            None,
        )
