"""The backward pass of the weighted sum of each token's rows: K of each, or any number."""

import triton
import triton.language as tl
from torch import Tensor

from megablocks_utils.kernels.device import is_interpreted
from megablocks_utils.kernels.fused.rounding import round_to

__all__ = ["combine_backward"]

_TILE_ELEMENTS = 1024


# One program makes the gradients of one token's K rows and K weights, BLOCK columns at a time:
#
#   grad (T, H)                       rows and grad_rows (N, H), in expert order
#   token 0  |    |    |    |         place 0  |    |    |    |
#   token 1  |####| ->            x         1  |####| ->          inverse: slot 0 of token 1
#   token 2  |    |    |    |               2  |    |    |    |
#                                           3  |####| ->          slot 1 of token 1
#
#   grad_rows[place] = grad[token] * weight           written tile by tile
#   grad_weight      = sum of grad[token] * rows[place]
#
# Where tokens have any number of rows, a program has one row, and reads which token's it is.
#
#   registers  products (K, BLOCK) in fp32, summed over the tiles and then over their columns
#   HBM        grad and rows are read once, grad_rows written once; nothing is added atomically
@triton.jit
def combine_backward_kernel(
    grad_ptr,
    rows_ptr,
    weight_ptr,
    inverse_ptr,
    token_ptr,
    grad_rows_ptr,
    grad_weight_ptr,
    num_cols,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_INVERSE: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    WANTS_ROWS: tl.constexpr,
    WANTS_WEIGHTS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Multiply a token's gradient by its weights, and by its rows, in fp32."""
    token = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, TOP_K_POW2)
    is_slot = slots < TOP_K
    routed = token * TOP_K + slots
    places = routed
    if HAS_INVERSE:
        places = tl.load(inverse_ptr + routed, mask=is_slot, other=0).to(tl.int64)
    if HAS_TOKENS:
        token = tl.load(token_ptr + token).to(tl.int64)
    weights = tl.load(weight_ptr + routed, mask=is_slot, other=0.0).to(tl.float32)
    products = tl.zeros((TOP_K_POW2, BLOCK), dtype=tl.float32)
    for first in range(0, num_cols, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        is_col = cols < num_cols
        at = places[:, None] * num_cols + cols[None, :]
        exists = is_slot[:, None] & is_col[None, :]
        grad = tl.load(grad_ptr + token * num_cols + cols, mask=is_col, other=0.0).to(tl.float32)
        if WANTS_WEIGHTS:
            rows = tl.load(rows_ptr + at, mask=exists, other=0.0).to(tl.float32)
            products += rows * grad[None, :]
        if WANTS_ROWS:
            weighted = grad[None, :] * weights[:, None]
            weighted = round_to(weighted, grad_rows_ptr.dtype.element_ty, INTERPRET)
            tl.store(grad_rows_ptr + at, weighted, mask=exists)
    if WANTS_WEIGHTS:
        sums = round_to(tl.sum(products, axis=1), grad_weight_ptr.dtype.element_ty, INTERPRET)
        tl.store(grad_weight_ptr + routed, sums, mask=is_slot)


def combine_backward(
    grad: Tensor,
    rows: Tensor,
    top_k_weights: Tensor,
    inverse: Tensor | None,
    *,
    token: Tensor | None = None,
    wants_rows: bool,
    wants_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of what `combine`, or `sum_rows`, has summed.

    Args:
        grad: (T, H) of the sums.
        rows: (N, H) in expert order.
        top_k_weights: (T, K), contiguous; with `token`, (N, 1).
        inverse: (N,) place of each routed row; None where they lie by routed row.
        token: (N,) whose row each is, where a token has any number of them.
        wants_rows: whether a gradient of the rows is needed.
        wants_weights: whether one of the weights is.

    Returns:
        Gradients of rows and weights, each of the shape and dtype of what it belongs to, or None.
    """
    num_programs, top_k = top_k_weights.shape
    num_cols = rows.shape[1]
    grad_rows = rows.new_empty(rows.shape) if wants_rows else None
    grad_weights = top_k_weights.new_empty(top_k_weights.shape) if wants_weights else None
    if num_programs == 0:
        return grad_rows, grad_weights
    top_k_pow2 = triton.next_power_of_2(top_k)
    block = min(triton.next_power_of_2(num_cols), max(64, _TILE_ELEMENTS // top_k_pow2))
    combine_backward_kernel[(num_programs,)](
        grad.contiguous(),
        rows,
        top_k_weights,
        inverse,
        token,
        grad_rows,
        grad_weights,
        num_cols,
        TOP_K=top_k,
        TOP_K_POW2=top_k_pow2,
        BLOCK=block,
        HAS_INVERSE=inverse is not None,
        HAS_TOKENS=token is not None,
        WANTS_ROWS=wants_rows,
        WANTS_WEIGHTS=wants_weights,
        INTERPRET=is_interpreted(),
        enable_fp_fusion=True,
    )
    return grad_rows, grad_weights
