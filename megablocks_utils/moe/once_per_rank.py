"""Run experts of all ranks on tokens that travel once to each rank, not once to each expert."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megablocks_utils.kernels.backends.backend import ExpertBackend
from megablocks_utils.kernels.permute import ExpertOrder, permute_tokens
from megablocks_utils.kernels.token_rows import copy_tokens, sum_rows
from megablocks_utils.kernels.weights import ExpertWeights
from megablocks_utils.mesh.token_dispatch import (
    TokenCounts,
    TokenRows,
    find_places,
    list_copies,
    list_received_rows,
    return_sums,
    send_routing,
    send_tokens,
)
from megablocks_utils.mesh.token_exchange import invert_permutation


@dataclass(frozen=True)
class RankRouting:
    """Which ranks and which experts this rank's tokens go to.

    `index (T, K)` and `weights (T, K)` are the router's; `order` sorts their rows by expert;
    `goes (T, P)` says which ranks have experts of a token.
    """

    index: Tensor
    weights: Tensor
    order: ExpertOrder
    goes: Tensor


def run_once_per_rank(
    hidden_states: Tensor,
    routing: RankRouting,
    counts: TokenCounts,
    group: ProcessGroup,
    backend: ExpertBackend,
    experts: ExpertWeights,
) -> Tensor:
    """Run tokens (T, H) through the experts of all ranks of the ep group, weighted: (T, H).

    A rank weights its experts' results and sums those of a token in fp32. One sum a token and rank
    comes back, in the dtype of compute, and these are summed in fp32 again.

    **Collective:** three all-to-alls on the group (routing, tokens, sums) and three in backward.

    Args:
        hidden_states: tokens of this rank.
        routing: where they go.
        counts: who sends how much to whom, from `exchange_token_counts`.
        group: the ep group.
        backend: runs the experts of this rank.
        experts: of this rank.
    """
    weights, rows = _exchange_routing(routing, counts, group)
    copies = list_copies(routing.goes, sum(counts.send_tokens))
    order = ExpertOrder(None, None, counts.received.sum(dim=0), top_k=1)
    # No name, here or in a caller, keeps rows that were sent while others are computed.
    received = send_tokens(copy_tokens(hidden_states, copies), counts, group)
    received = copy_tokens(received, rows)
    received = sum_rows(backend(received, order, None, experts), weights, rows)
    return sum_rows(return_sums(received, counts, group), None, copies)


def _exchange_routing(
    routing: RankRouting, counts: TokenCounts, group: ProcessGroup
) -> tuple[Tensor, TokenRows]:
    """Return the weights (R,) of the rows here, in expert order, and whose rows they are."""
    order = routing.order
    assert order.order is not None and order.inverse is not None, order
    num_local = counts.received.shape[1]
    places = find_places(routing.goes, routing.index, num_local).index_select(0, order.order)
    weights = routing.weights.to(torch.promote_types(routing.weights.dtype, torch.float32))
    by_expert = ExpertOrder(order.order, order.inverse, order.tokens_per_expert, top_k=1)
    weights = permute_tokens(weights.reshape(-1), by_expert)
    weights, places = send_routing(weights, places, counts, group)
    rows, arrived = list_received_rows(counts, places)
    here = ExpertOrder(arrived, invert_permutation(arrived), order.tokens_per_expert, top_k=1)
    return permute_tokens(weights, here), rows
