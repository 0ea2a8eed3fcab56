"""Run experts of all ranks on tokens that travel once to each rank, not once to each expert."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megablocks_utils.config.dispatch_cost import DispatchChoice, TokenTraffic, choose_dispatch
from megablocks_utils.kernels.backends.backend import ExpertBackend
from megablocks_utils.kernels.fused.unpermute import fused_sum_rows
from megablocks_utils.kernels.permute import ExpertOrder, permute_tokens
from megablocks_utils.kernels.token_rows import copy_tokens, sum_rows
from megablocks_utils.kernels.weights import ExpertWeights
from megablocks_utils.mesh.token_dispatch import (
    TokenRows,
    find_places,
    list_copies,
    list_received_rows,
    send_routing,
)
from megablocks_utils.mesh.token_exchange import (
    ExchangedCounts,
    PendingCounts,
    TokenSizes,
    combine_rows,
    dispatch_rows,
    invert_permutation,
)
from megablocks_utils.moe.expert_spec import ExpertSpec


def choose_layer_dispatch(
    wanted: str,
    spec: ExpertSpec,
    *,
    top_k: int | None,
    ep_size: int,
    dtype: torch.dtype,
    expert_tp_size: int = 1,
) -> DispatchChoice:
    """Choose how the tokens of a layer travel.

    Args:
        wanted: `auto`, `rows` or `tokens`.
        spec: what the experts are.
        top_k: experts of a token; None where the model does not say it.
        ep_size: ranks that the experts are split over.
        dtype: of compute.
        expert_tp_size: ranks that each expert is split over.

    Raises:
        ConfigurationError: `tokens`, where each result of an expert is needed by itself.
    """
    traffic = None
    if top_k is not None:
        hidden_bytes = spec.hidden_size * dtype.itemsize
        traffic = TokenTraffic(spec.num_experts, top_k, ep_size, hidden_bytes)
    return choose_dispatch(wanted, traffic, _find_unsupported_reason(spec, expert_tp_size))


def _find_unsupported_reason(spec: ExpertSpec, expert_tp_size: int) -> str | None:
    if expert_tp_size > 1:
        return f"with expert_tp_size {expert_tp_size} each slice of an expert needs its own rows"
    if spec.has_post_norm:
        return "the norm behind the experts of this model needs the result of each by itself"
    if spec.is_weighted_before:
        return "this model weights tokens before their experts, so that each gets another row"
    return None


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
    pending: PendingCounts,
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
        pending: who sends how much to whom, from `exchange_counts`.
        group: the ep group.
        backend: runs the experts of this rank.
        experts: of this rank.
    """
    counts = pending.wait()
    assert counts.tokens is not None, counts
    copies = list_copies(routing.goes, sum(counts.tokens.send_sizes))
    weights, rows = _exchange_routing(routing, counts, counts.tokens, group)
    order = ExpertOrder(None, None, counts.received.sum(dim=0), top_k=1)
    # No name, here or in a caller, keeps rows that were sent while others are computed.
    results = dispatch_rows(copy_tokens(hidden_states, copies), counts.tokens, group)
    results = copy_tokens(results, rows)
    results = fused_sum_rows(backend(results, order, None, experts), weights, rows)
    return sum_rows(combine_rows(results, counts.tokens, group), None, copies)


def _exchange_routing(
    routing: RankRouting, counts: ExchangedCounts, tokens: TokenSizes, group: ProcessGroup
) -> tuple[Tensor, TokenRows]:
    """Return the weights (R,) of the rows here, in expert order, and whose rows they are."""
    order = routing.order
    assert order.order is not None, order
    num_local = counts.received.shape[1]
    places = find_places(routing.goes, routing.index, num_local).index_select(0, order.order)
    weights = routing.weights.to(torch.promote_types(routing.weights.dtype, torch.float32))
    weights = permute_tokens(weights.reshape(-1), replace(order, top_k=1))
    weights, places = send_routing(weights, places, counts, group)
    rows, arrived = list_received_rows(counts, tokens, places)
    here = ExpertOrder(arrived, invert_permutation(arrived), order.tokens_per_expert, top_k=1)
    return permute_tokens(weights, here), rows
