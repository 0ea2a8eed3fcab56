"""Gather tokens, multiply them by gate and up at once, and apply the gate: one kernel."""

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
    GateLayout,
    Inner,
    Matrix,
    Routing,
    block_rank,
    launch_options,
    weights_argument,
)
from megablocks_utils.kernels.fused.tiles import Tile


@triton.jit
def apply_gate(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Compute `kernels.gate.SwiGlu` in fp32; a LIMIT of 0 is none."""
    if LIMIT > 0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
    return gate * tl.sigmoid(ALPHA * gate) * up


@triton.jit
def gate_up_kernel(
    x_ptr,
    w,
    out_ptr,
    hidden_ptr,
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
    stride_xm,
    stride_we,
    stride_wn,
    stride_wk,
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
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    KEEP_HIDDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    K_IS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Compute a tile of out = gate(hidden), hidden = x @ w + inner @ factor + bias.

    The program owns the same BLOCK_N columns of gate and of up. `num_cols` is I.
    """
    tile_m, tile_n = swizzle(tl.program_id(0), num_tiles_m, num_tiles_n, GROUP_M)
    expert, rows, end = find_rows(offsets_ptr, tile_m, num_experts, EXPERTS_POW2, BLOCK_M)
    if expert >= num_experts:
        return
    exists = rows < end
    source = read_order(order_ptr, rows, exists, HAS_ORDER) // TOP_K
    first_col = tile_n * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    is_col = cols < num_cols
    two_cols = 2 * num_cols
    gate_cols = 2 * cols if INTERLEAVED else cols
    up_cols = 2 * cols + 1 if INTERLEAVED else cols + num_cols
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_k in range(0, num_k, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, source, exists, k, num_k, stride_xm, EVEN_K)
        if USE_TMA:
            w_gate = load_weights_tma(w, expert, first_k, first_col, num_k, two_cols, K_IS_LAST)
            w_up = load_weights_tma(
                w, expert, first_k, first_col + num_cols, num_k, two_cols, K_IS_LAST
            )
        else:
            w_gate = load_weights(
                w, expert, k, gate_cols, is_col, num_k, stride_we, stride_wn, stride_wk, EVEN_K
            )
            w_up = load_weights(
                w, expert, k, up_cols, is_col, num_k, stride_we, stride_wn, stride_wk, EVEN_K
            )
        gate = dot(x, w_gate, gate, PRECISION, INTERPRET)
        up = dot(x, w_up, up, PRECISION, INTERPRET)
    if HAS_LORA:
        gate = add_low_rank(
            gate,
            inner_ptr,
            rows,
            exists,
            rank,
            factor_ptr,
            expert,
            gate_cols,
            is_col,
            stride_fe,
            stride_fn,
            stride_fr,
            BLOCK_R,
            PRECISION,
            INTERPRET,
        )
        up = add_low_rank(
            up,
            inner_ptr,
            rows,
            exists,
            rank,
            factor_ptr,
            expert,
            up_cols,
            is_col,
            stride_fe,
            stride_fn,
            stride_fr,
            BLOCK_R,
            PRECISION,
            INTERPRET,
        )
    if HAS_BIAS:
        bias_ptr += expert.to(tl.int64) * stride_be
        gate += tl.load(bias_ptr + gate_cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + up_cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    gate, up = round_to(gate, dtype, INTERPRET), round_to(up, dtype, INTERPRET)
    mask = exists[:, None] & is_col[None, :]
    row_starts = rows.to(tl.int64)[:, None]
    if KEEP_HIDDEN:
        tl.store(hidden_ptr + row_starts * two_cols + gate_cols[None, :], gate, mask=mask)
        tl.store(hidden_ptr + row_starts * two_cols + up_cols[None, :], up, mask=mask)
    # From the rounded values, as the backward pass will make it again.
    out = apply_gate(gate.to(tl.float32), up.to(tl.float32), ALPHA, LIMIT)
    tl.store(
        out_ptr + row_starts * num_cols + cols[None, :],
        round_to(out, dtype, INTERPRET),
        mask=mask,
    )


def gate_up(
    tokens: Tensor,
    weights: Matrix,
    routing: Routing,
    tile: Tile,
    layout: GateLayout,
    *,
    keeps_hidden: bool,
    inner: Inner | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the first half of the experts.

    Args:
        tokens: (T, H).
        weights: the experts' (H, 2 * I).
        routing: which rows go to which expert.
        tile: sizes of a program's work, its columns counted in I.
        layout: order of the 2 * I outputs, and the gate.
        keeps_hidden: whether the outputs before the gate are wanted.
        inner: a low-rank product to add to these.
        bias: (L, 2 * I) to add to these.

    Returns:
        (N, I) in expert order, and (N, 2 * I) or None.
    """
    num_k, num_cols = weights.num_rows, weights.num_cols // 2
    out = tokens.new_empty(routing.num_rows, num_cols)
    hidden = tokens.new_empty(routing.num_rows, 2 * num_cols) if keeps_hidden else None
    if routing.num_rows == 0:
        return out, hidden
    grid_m, grid_n = routing.num_tiles(tile.block_m), triton.cdiv(num_cols, tile.block_n)
    uses_tma = not layout.is_interleaved and weights.fits_descriptor(tile)
    factor = inner.factor if inner else weights
    gate_up_kernel[(grid_m * grid_n,)](
        tokens,
        weights_argument(weights, tile, uses_tma),
        out,
        hidden,
        routing.order,
        routing.offsets,
        bias,
        inner.rows if inner else tokens,
        factor.tensor,
        routing.num_experts,
        num_k,
        num_cols,
        grid_m,
        grid_n,
        factor.num_rows,
        tokens.stride(0),
        *weights.strides,
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
        INTERLEAVED=layout.is_interleaved,
        ALPHA=layout.gate.alpha,
        LIMIT=layout.gate.limit or 0.0,
        KEEP_HIDDEN=keeps_hidden,
        HAS_BIAS=bias is not None,
        HAS_LORA=inner is not None,
        EVEN_K=num_k % tile.block_k == 0,
        USE_TMA=uses_tma,
        K_IS_LAST=weights.rows_are_last,
        **launch_options(tokens, tile),
    )
    return out, hidden
