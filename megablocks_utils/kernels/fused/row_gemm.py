"""Multiply rows by their experts' matrices: the down projection, input gradients, adapters."""

import triton
import triton.language as tl
from torch import Tensor

from megablocks_utils.kernels.fused.device_code import (
    add_low_rank,
    dot,
    find_rows,
    load_rows,
    load_weights,
    load_weights_tma,
    read_order,
    round_to,
    swizzle,
)
from megablocks_utils.kernels.fused.launch import (
    GROUP_M,
    Inner,
    Matrix,
    Routing,
    block_rank,
    launch_options,
    weights_argument,
)
from megablocks_utils.kernels.fused.tiles import Tile


@triton.jit
def row_gemm_kernel(
    x_ptr,
    w,
    out_ptr,
    order_ptr,
    offsets_ptr,
    bias_ptr,
    inner_ptr,
    factor_ptr,
    num_experts,
    num_k,
    num_cols,
    num_tiles_m,
    num_tiles_n,
    rank,
    scale,
    stride_xm,
    stride_we,
    stride_wn,
    stride_wk,
    stride_om,
    stride_be,
    stride_fe,
    stride_fn,
    stride_fr,
    TOP_K: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    K_IS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Compute one tile of out[i] = scale * x[i] @ w[expert of i] + inner[i] @ factor + bias.

    `x` is read in expert order or, with GATHER, from the tokens; `out` is written in expert order
    or, with SCATTER, in the order of routed rows.
    """
    tile_m, tile_n = swizzle(tl.program_id(0), num_tiles_m, num_tiles_n, GROUP_M)
    expert, rows, end = find_rows(offsets_ptr, tile_m, num_experts, EXPERTS_POW2, BLOCK_M)
    if expert >= num_experts:
        return
    exists = rows < end
    routed = read_order(order_ptr, rows, exists, HAS_ORDER)
    source = routed // TOP_K if GATHER else rows.to(tl.int64)
    first_col = tile_n * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    is_col = cols < num_cols
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_k in range(0, num_k, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, source, exists, k, num_k, stride_xm, EVEN_K)
        if USE_TMA:
            weights = load_weights_tma(w, expert, first_k, first_col, num_k, num_cols, K_IS_LAST)
        else:
            weights = load_weights(
                w, expert, k, cols, is_col, num_k, stride_we, stride_wn, stride_wk, EVEN_K
            )
        acc = dot(x, weights, acc, PRECISION, INTERPRET)
    acc *= scale
    if HAS_LORA:
        acc = add_low_rank(
            acc,
            inner_ptr,
            rows,
            exists,
            rank,
            factor_ptr,
            expert,
            cols,
            is_col,
            stride_fe,
            stride_fn,
            stride_fr,
            BLOCK_R,
            PRECISION,
            INTERPRET,
        )
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * stride_be + cols, mask=is_col, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    target = routed if SCATTER else rows.to(tl.int64)
    tl.store(
        out_ptr + target[:, None] * stride_om + cols[None, :],
        round_to(acc, out_ptr.dtype.element_ty, INTERPRET),
        mask=exists[:, None] & is_col[None, :],
    )


def row_gemm(
    x: Tensor,
    weights: Matrix,
    routing: Routing,
    tile: Tile,
    *,
    gather: bool = False,
    scatter: bool = False,
    scale: float = 1.0,
    inner: Inner | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply every routed row by its expert's matrix.

    Args:
        x: (N, K) in expert order, or with `gather` (T, K) by token.
        weights: the experts' (K, columns).
        routing: which rows go to which expert.
        tile: sizes of a program's work.
        gather: read `x` by token.
        scatter: write routed rows, token by token, instead of expert order.
        scale: factor of the product.
        inner: a low-rank product to add, unscaled.
        bias: (L, columns) to add, unscaled.

    Returns:
        (N, columns).
    """
    num_k, num_cols = weights.num_rows, weights.num_cols
    out = x.new_empty(routing.num_rows, num_cols)
    if routing.num_rows == 0:
        return out
    grid_m, grid_n = routing.num_tiles(tile.block_m), triton.cdiv(num_cols, tile.block_n)
    uses_tma = weights.fits_descriptor(tile)
    factor = inner.factor if inner else weights
    row_gemm_kernel[(grid_m * grid_n,)](
        x,
        weights_argument(weights, tile, uses_tma),
        out,
        routing.order,
        routing.offsets,
        bias,
        inner.rows if inner else x,
        factor.tensor,
        routing.num_experts,
        num_k,
        num_cols,
        grid_m,
        grid_n,
        factor.num_rows,
        scale,
        x.stride(0),
        *weights.strides,
        out.stride(0),
        bias.stride(0) if bias is not None else 0,
        *factor.strides,
        TOP_K=routing.top_k,
        EXPERTS_POW2=routing.experts_pow2,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_R=block_rank(factor.num_rows) if inner else 16,
        GROUP_M=GROUP_M,
        HAS_ORDER=routing.order is not None,
        GATHER=gather,
        SCATTER=scatter,
        HAS_BIAS=bias is not None,
        HAS_LORA=inner is not None,
        EVEN_K=num_k % tile.block_k == 0,
        USE_TMA=uses_tma,
        K_IS_LAST=weights.rows_are_last,
        **launch_options(x, tile),
    )
    return out
