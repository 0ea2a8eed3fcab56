"""Put routed rows into expert order and back: pure functions with exact, deterministic gradients.

Plain indexing would do the same in the forward pass, but its backward pass scatters with additions
(atomic, and so not repeatable, on a GPU; slow on a CPU). A permutation is undone by a gather.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import embedding_bag

from megablocks_utils.mesh.token_exchange import invert_permutation

_BLOCK_ELEMENTS_CPU, _BLOCK_ELEMENTS = 2**17, 2**26


@dataclass(frozen=True)
class ExpertOrder:
    """Order that sorts N = T * K routed rows by expert; all of it on the device.

    `order (N,)`: routed row (token * K + slot) at each sorted place; `inverse (N,)`: sorted place
    of each routed row, both None where the rows are sorted already; `tokens_per_expert`: int64
    counts of rows, one an expert, that sum to N; `top_k`: K.
    """

    order: Tensor | None
    inverse: Tensor | None
    tokens_per_expert: Tensor
    top_k: int

    def of_sorted_rows(self) -> "ExpertOrder":
        """Return the order of the N rows once they are sorted, each with one expert."""
        return ExpertOrder(None, None, self.tokens_per_expert, top_k=1)


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> ExpertOrder:
    """Sort routed rows by expert, rows of one expert in token order.

    Args:
        top_k_index: (T, K) expert of each token's slots.
        num_experts: E.
    """
    return sort_counted_rows(top_k_index, count_by_expert(top_k_index, num_experts))


def count_by_expert(top_k_index: Tensor, num_experts: int) -> Tensor:
    """Count the routed rows (T, K) of every expert: (E,) int64."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=top_k_index.device)
    return counts.scatter_(0, top_k_index.reshape(-1), 1, reduce="add")


def sort_counted_rows(top_k_index: Tensor, tokens_per_expert: Tensor) -> ExpertOrder:
    """Sort routed rows (T, K) that were counted before: see `sort_by_expert`."""
    order = top_k_index.reshape(-1).argsort(stable=True)
    inverse = invert_permutation(order)
    return ExpertOrder(order, inverse, tokens_per_expert, top_k_index.shape[1])


def permute_tokens(hidden_states: Tensor, order: ExpertOrder) -> Tensor:
    """Copy each token (T, H) once for each of its K experts, in expert order: (N, H)."""
    if order.order is None:
        return hidden_states
    if order.top_k == 1:
        return _ReorderRows.apply(hidden_states, order.order, order.inverse)
    return _PermuteTokens.apply(hidden_states, order.order, order.inverse, order.top_k)


def unpermute_and_combine(rows: Tensor, top_k_weights: Tensor | None, order: ExpertOrder) -> Tensor:
    """Sum each token's K results with its routing weights, in fp32 (fp64 for fp64 rows).

    Args:
        rows: (N, H) results in expert order.
        top_k_weights: (T, K); None, with K = 1, takes the results as they are.
        order: the order the rows are in.

    Returns:
        (T, H) in the dtype of `rows`.
    """
    if top_k_weights is None:
        assert order.top_k == 1, order.top_k
        return rows if order.order is None else _ReorderRows.apply(rows, order.inverse, order.order)
    return _CombineRows.apply(rows, top_k_weights, order.order, order.inverse)


def _sum_slots(rows: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """Gather each token's K rows (N, H) and add them up in fp32, in one pass without a copy.

    Weights of a higher precision than the rows enter as two parts, each row twice: what the rows'
    dtype can hold of them, and the rest.
    """
    slots = inverse.view(-1, top_k)
    if weights is not None and weights.dtype != rows.dtype:
        high = weights.to(rows.dtype)
        low = (weights - high.to(weights.dtype)).to(rows.dtype)
        slots, weights = torch.cat([slots, slots], dim=1), torch.cat([high, low], dim=1)
    return embedding_bag(slots, rows, mode="sum", per_sample_weights=weights)


def dot_rows(one: Tensor, other: Tensor) -> Tensor:
    """Return the dot product of every pair of rows (N, H), in fp32 or better: (N,).

    In blocks, so that copies in fp32 stay small; on a CPU, in its cache.
    """
    dtype = torch.promote_types(one.dtype, torch.float32)
    elements = _BLOCK_ELEMENTS_CPU if one.device.type == "cpu" else _BLOCK_ELEMENTS
    size = max(1, elements // max(1, one.shape[1]))
    blocks = zip(one.split(size), other.split(size), strict=True)
    return torch.cat([vecdot(a.to(dtype), b.to(dtype)) for a, b in blocks])


class _PermuteTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, order: Tensor, inverse: Tensor, top_k: int
    ) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return hidden_states.index_select(0, order.div(top_k, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return _sum_slots(grad, inverse, None, ctx.top_k), None, None, None


class _ReorderRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _CombineRows(torch.autograd.Function):
    """Weighted sum per token; saves only the rows, the weights and the order."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, top_k_weights: Tensor, order: Tensor, inverse: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, top_k_weights, order, inverse)
        return _sum_slots(rows, inverse, top_k_weights, top_k_weights.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, top_k_weights, order, inverse = ctx.saved_tensors
        token = order.div(top_k_weights.shape[1], rounding_mode="floor")
        grad_rows, grad_weights = grad.index_select(0, token), None
        if ctx.needs_input_grad[1]:
            by_slot = dot_rows(rows, grad_rows).index_select(0, inverse)
            grad_weights = by_slot.view_as(top_k_weights).to(top_k_weights.dtype)
        if ctx.needs_input_grad[0]:
            # In place, each product is rounded to the dtype of the rows once.
            weights = top_k_weights.reshape(-1).index_select(0, order)
            grad_rows.mul_(weights.unsqueeze(1))
        return grad_rows, grad_weights, None, None
