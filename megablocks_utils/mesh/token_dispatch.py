"""Send each token once to every rank that holds experts of it, and one sum a rank back.

The counterpart of `token_exchange` where tokens have several experts on a rank. Beside the tokens
travel eight bytes for each routed row, in expert order: which of the tokens that its rank gets it
is of, and its routing weight. The receiver makes the rows, runs them, and sums each token's.

Every rank of the ep group must enter every exchange, also with no token to send.

Legend: T tokens of this rank, K experts a token, N = T * K; P ranks of the group, E experts, L of
them here; S copies of tokens that this rank sends, G tokens that it gets, R rows these become here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megablocks_utils.mesh.token_exchange import (
    DispatchPlan,
    combine_rows,
    dispatch_rows,
    exchange_rows,
    expert_major_order,
)


@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens, any number of each; all of it on the device.

    `token (N,)`: the token of each row; `by_token (N,)`: the rows listed token by token; `starts
    (T,)`: where each token's rows start in that list.
    """

    token: Tensor
    by_token: Tensor
    starts: Tensor


@dataclass(frozen=True)
class TokenCounts:
    """Who sends how much to whom.

    `received (P, L)` counts, on the device, the rows at each expert here of each rank's tokens, and
    `received_tokens (P,)` these tokens. On the host, by rank of the group: the tokens sent and got,
    and the rows that they become.
    """

    received: Tensor
    received_tokens: Tensor
    send_tokens: list[int]
    send_rows: list[int]
    receive_tokens: list[int]
    receive_rows: list[int]


CountTokens = Callable[[Tensor, Tensor, ProcessGroup], TokenCounts]


def exchange_token_counts(
    tokens_per_expert: Tensor, tokens_per_rank: Tensor, group: ProcessGroup
) -> TokenCounts:
    """Tell every rank of the group how many tokens it will get, and how many rows they become.

    **Collective:** one all-to-all of E + P integers on the ep group, then one host read.

    Args:
        tokens_per_expert: (E,) int64, this rank's rows for every expert of the layer.
        tokens_per_rank: (P,) int64, this rank's tokens for every rank of the group.
        group: the ep group.
    """
    sent = torch.cat([tokens_per_expert.view(len(tokens_per_rank), -1), tokens_per_rank[:, None]], 1)
    received = exchange_rows(sent.view(-1), None, None, group).view_as(sent)
    both = torch.stack([sent, received])
    sizes = torch.stack([both[..., -1], both[..., :-1].sum(-1)], 1)  # (2, 2, P)
    (send_tokens, send_rows), (receive_tokens, receive_rows) = sizes.tolist()
    return TokenCounts(
        received[:, :-1],
        received[:, -1],
        send_tokens,
        send_rows,
        receive_tokens,
        receive_rows,
    )


def find_ranks_of_tokens(top_k_index: Tensor, num_local: int, ep_size: int) -> Tensor:
    """Say to which ranks each token goes: (T, P), true where the rank has one of its experts.

    Args:
        top_k_index: (T, K) experts of each token.
        num_local: L.
        ep_size: P.
    """
    shape = len(top_k_index), ep_size
    goes = torch.zeros(shape, dtype=torch.bool, device=top_k_index.device)
    return goes.scatter_(1, top_k_index // num_local, True)


def list_copies(goes: Tensor, num_copies: int) -> TokenRows:
    """List the copies of this rank's tokens that are sent, by rank and there in token order.

    Args:
        goes: (T, P), from `find_ranks_of_tokens`.
        num_copies: S, how many are true.
    """
    num_tokens, num_ranks = goes.shape
    numbers = torch.arange(num_copies, device=goes.device)
    up_to_here = goes.reshape(-1).cumsum(0)
    cell = torch.searchsorted(up_to_here, numbers, right=True)  # of (T, P)
    cell_by_rank = cell % num_ranks * num_tokens + cell // num_ranks
    up_to_here_by_rank = goes.t().reshape(-1).cumsum(0)
    return TokenRows(
        torch.searchsorted(up_to_here_by_rank, numbers, right=True) % max(1, num_tokens),
        up_to_here_by_rank.index_select(0, cell_by_rank) - 1,
        up_to_here.view_as(goes)[:, 0] - goes[:, 0].long(),
    )


def find_places(goes: Tensor, top_k_index: Tensor, num_local: int) -> Tensor:
    """Return which of the tokens that its rank gets each routed row (N,) is of, counted from 0."""
    places = goes.cumsum(0) - 1  # (T, P)
    return places.gather(1, top_k_index // num_local).view(-1)


def list_received_rows(counts: TokenCounts, places: Tensor) -> tuple[TokenRows, Tensor]:
    """List the rows that received tokens become, in expert order.

    Args:
        counts: who sends what.
        places: (R,) as they came: which of its sender's tokens each row is of.

    Returns:
        The rows, and where each was among those that came (R,).
    """
    first_token = counts.received_tokens.cumsum(0) - counts.received_tokens
    num_rows = len(places)
    sender = counts.received.sum(dim=1)
    token = places + first_token.repeat_interleave(sender, output_size=num_rows)
    expert_major = expert_major_order(counts.received, num_rows)
    token = token.index_select(0, expert_major)
    in_order, by_token = token.sort(stable=True)
    tokens = torch.arange(sum(counts.receive_tokens), device=places.device)
    return TokenRows(token, by_token, torch.searchsorted(in_order, tokens)), expert_major


def send_routing(
    weights: Tensor, places: Tensor, counts: TokenCounts, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Send weights (N,) and places (N,) of rows in expert order; returns those received, (R,) each.

    **Collective:** one all-to-all on the ep group, and one more in backward for the gradients of
    the weights, where they need one.

    Args:
        weights: routing weights, fp32 or fp64.
        places: from `find_places`.
        counts: who sends what.
        group: the ep group.
    """
    return _SendRouting.apply(weights, places, counts.receive_rows, counts.send_rows, group)


def send_tokens(copies: Tensor, counts: TokenCounts, group: ProcessGroup) -> Tensor:
    """Send copies of tokens (S, H), by rank; returns those received (G, H), by sender.

    **Collective:** one all-to-all on the ep group, and one more in backward.
    """
    return dispatch_rows(copies, _plan(counts), group)


def return_sums(sums: Tensor, counts: TokenCounts, group: ProcessGroup) -> Tensor:
    """Send sums (G, H) of the tokens received back to the senders; returns (S, H).

    **Collective:** one all-to-all on the ep group, and one more in backward.
    """
    return combine_rows(sums, _plan(counts), group)


def _plan(counts: TokenCounts) -> DispatchPlan:
    return DispatchPlan(counts.send_tokens, counts.receive_tokens, counts.received_tokens, None, None)


class _SendRouting(torch.autograd.Function):
    """Weights and places as pairs of integers of equal size: one exchange for both."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        places: Tensor,
        output_sizes: list[int],
        input_sizes: list[int],
        group: ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        ctx.sizes, ctx.group = (output_sizes, input_sizes), group
        integer = torch.int64 if weights.dtype == torch.float64 else torch.int32
        pairs = torch.stack([weights.view(integer), places.to(integer)], dim=1)
        pairs = exchange_rows(pairs, output_sizes, input_sizes, group)
        received = pairs[:, 0].contiguous().view(weights.dtype), pairs[:, 1].to(places.dtype)
        ctx.mark_non_differentiable(received[1])
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        output_sizes, input_sizes = ctx.sizes
        rows = grad.contiguous().unsqueeze(1)
        back = exchange_rows(rows, input_sizes, output_sizes, ctx.group)
        return back.squeeze(1), None, None, None, None
