"""Send each token once to every rank that holds experts of it, and one sum a rank back.

The counterpart of `token_exchange` where tokens have several experts on a rank. Beside the tokens
travel eight bytes for each routed row, in expert order: which of the tokens that its rank gets it
is of, and its routing weight. The receiver makes the rows, runs them, and sums each token's.

Every rank of the ep group must enter every exchange, also with no token to send.

Legend: T tokens of this rank, K experts a token, N = T * K; P ranks of the group, E experts, L of
them here; S copies of tokens that this rank sends, G tokens that it gets, R rows these become here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megablocks_utils.mesh.recomputation import keep
from megablocks_utils.mesh.token_exchange import (
    ExchangedCounts,
    SplitSizes,
    TokenSizes,
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


def list_received_rows(
    counts: ExchangedCounts, tokens: TokenSizes, places: Tensor
) -> tuple[TokenRows, Tensor]:
    """List the rows that received tokens become, in expert order.

    Args:
        counts: of rows.
        tokens: of tokens.
        places: (R,) as they came: which of its sender's tokens each row is of.

    Returns:
        The rows, and where each was among those that came (R,).
    """
    num_rows = len(places)
    first_token = tokens.received.cumsum(0) - tokens.received
    rows_of_sender = counts.received.sum(dim=1)
    token = places + first_token.repeat_interleave(rows_of_sender, output_size=num_rows)
    expert_major = expert_major_order(counts.received, num_rows)
    token = token.index_select(0, expert_major)
    in_order, by_token = token.sort(stable=True)
    numbers = torch.arange(sum(tokens.receive_sizes), device=places.device)
    return TokenRows(token, by_token, torch.searchsorted(in_order, numbers)), expert_major


def send_routing(
    weights: Tensor, places: Tensor, sizes: SplitSizes, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Send weights (N,) and places (N,) of rows in expert order; returns those received, (R,) each.

    **Collective:** one all-to-all on the ep group, and one more in backward for the gradients of
    the weights, where they need one. A recomputed layer has kept it.

    Args:
        weights: routing weights, fp32 or fp64.
        places: from `find_places`.
        sizes: of rows.
        group: the ep group.
    """
    return _SendRouting.apply(weights, places, sizes.receive_sizes, sizes.send_sizes, group)


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
        pairs = keep(lambda: exchange_rows(pairs, output_sizes, input_sizes, group))
        received = pairs[:, 0].contiguous().view(weights.dtype), pairs[:, 1].to(places.dtype)
        ctx.mark_non_differentiable(received[1])
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        output_sizes, input_sizes = ctx.sizes
        rows = grad.contiguous().unsqueeze(1)
        back = exchange_rows(rows, input_sizes, output_sizes, ctx.group)
        return back.squeeze(1), None, None, None, None
