"""Make rows of tokens, any number of each, and sum them: exact and deterministic gradients.

As `permute` does it for K rows of each token: what one direction gathers, the other sums in order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from megablocks_utils.kernels.permute import dot_rows
from megablocks_utils.mesh.token_dispatch import TokenRows


def copy_tokens(tokens: Tensor, rows: TokenRows) -> Tensor:
    """Copy each token (T, H) once for each of its rows: (N, H)."""
    return _CopyTokens.apply(tokens, rows.token, rows.by_token, rows.starts)


def sum_rows(values: Tensor, weights: Tensor | None, rows: TokenRows) -> Tensor:
    """Sum each token's rows in fp32 (fp64 for fp64 values).

    Args:
        values: (N, H).
        weights: (N,) that they are weighted with, or None.
        rows: whose they are.

    Returns:
        (T, H) in the dtype of `values`.
    """
    return _SumRows.apply(values, weights, rows.token, rows.by_token, rows.starts)


def sum_in_order(
    values: Tensor, weights: Tensor | None, by_token: Tensor, starts: Tensor
) -> Tensor:
    """Sum in one pass without a copy; see `permute._sum_slots` for weights of higher precision."""
    if weights is not None:
        weights = weights.index_select(0, by_token)
        if weights.dtype != values.dtype:
            high = weights.to(values.dtype)
            low = (weights - high.to(weights.dtype)).to(values.dtype)
            weights = torch.stack([high, low], dim=1).view(-1)
            by_token, starts = by_token.repeat_interleave(2), 2 * starts
    return embedding_bag(by_token, values, starts, mode="sum", per_sample_weights=weights)


class _CopyTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, token: Tensor, by_token: Tensor, starts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(by_token, starts)
        return tokens.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return sum_in_order(grad, None, *ctx.saved_tensors), None, None, None


class _SumRows(torch.autograd.Function):
    """Saves the values only for the gradients of weights."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weights: Tensor | None,
        token: Tensor,
        by_token: Tensor,
        starts: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(values if ctx.needs_input_grad[1] else None, weights, token)
        return sum_in_order(values, weights, by_token, starts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, weights, token = ctx.saved_tensors
        grad_values, grad_weights = grad.index_select(0, token), None
        if ctx.needs_input_grad[1]:
            grad_weights = dot_rows(values, grad_values).to(weights.dtype)
        if weights is not None and ctx.needs_input_grad[0]:
            # In place, each product is rounded to the dtype of the values once.
            grad_values.mul_(weights.unsqueeze(1))
        return grad_values, grad_weights, None, None, None
