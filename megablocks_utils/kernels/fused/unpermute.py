"""The weighted sum of each token's rows: one kernel each way on a GPU, torch's operators elsewhere.

Torch's operators read fp32 weights in two parts, each row twice, and their backward pass makes
products of N * H numbers in fp32.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megablocks_utils.kernels.permute import ExpertOrder, unpermute_and_combine
from megablocks_utils.kernels.token_rows import sum_in_order, sum_rows
from megablocks_utils.mesh.token_dispatch import TokenRows

__all__ = ["CombineKernels", "find_combine_kernels", "fused_sum_rows"]
__all__ += ["fused_unpermute_and_combine"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CombineKernels(NamedTuple):
    """What sums rows, and what goes back through it: `combine` and `combine_backward`."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor | None, Tensor | None]]


def fused_unpermute_and_combine(
    rows: Tensor, top_k_weights: Tensor | None, order: ExpertOrder
) -> Tensor:
    """Do what `unpermute_and_combine` does, in one kernel each way where there is a GPU."""
    kernels = None if top_k_weights is None else find_combine_kernels(rows.device, rows.dtype)
    if kernels is None:
        return unpermute_and_combine(rows, top_k_weights, order)
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        return _CombineRows.apply(kernels, rows, top_k_weights, order.inverse)


def fused_sum_rows(values: Tensor, weights: Tensor, rows: TokenRows) -> Tensor:
    """Do what `sum_rows` does, whose backward pass is one kernel where there is a GPU."""
    kernels = find_combine_kernels(values.device, values.dtype) if weights.requires_grad else None
    if kernels is None:
        return sum_rows(values, weights, rows)
    with torch.cuda.device_of(values):
        return _SumRows.apply(kernels, values, weights, rows)


def find_combine_kernels(device: torch.device, dtype: torch.dtype) -> CombineKernels | None:
    """Return what sums rows there; None where torch's operators do."""
    return _load_kernels() if device.type == "cuda" and dtype in _DTYPES else None


@cache
def _load_kernels() -> CombineKernels | None:
    """Return the kernels, or None without Triton."""
    if find_spec("triton") is None:
        return None
    from megablocks_utils.kernels.fused.combine import combine
    from megablocks_utils.kernels.fused.combine_backward import combine_backward

    return CombineKernels(combine, combine_backward)


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: CombineKernels, rows: Tensor, top_k_weights: Tensor, inverse: Tensor
    ) -> Tensor:
        rows, top_k_weights = rows.contiguous(), top_k_weights.contiguous()
        ctx.kernels = kernels
        ctx.save_for_backward(rows, top_k_weights, inverse)
        return kernels.forward(rows, top_k_weights, top_k_weights.shape[1], inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, wants_rows, wants_weights, _ = ctx.needs_input_grad
        grads = ctx.kernels.backward(
            grad, *ctx.saved_tensors, wants_rows=wants_rows, wants_weights=wants_weights
        )
        return None, *grads, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: CombineKernels, values: Tensor, weights: Tensor, rows: TokenRows
    ) -> Tensor:
        values, weights = values.contiguous(), weights.contiguous()
        ctx.kernels = kernels
        ctx.save_for_backward(values, weights, rows.token)
        return sum_in_order(values, weights, rows.by_token, rows.starts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, weights, token = ctx.saved_tensors
        _, wants_values, _, _ = ctx.needs_input_grad
        by_row = weights.unsqueeze(1)
        grad_values, grad_weights = ctx.kernels.backward(
            grad, values, by_row, None, token=token, wants_rows=wants_values, wants_weights=True
        )
        return None, grad_values, grad_weights.squeeze(1), None
