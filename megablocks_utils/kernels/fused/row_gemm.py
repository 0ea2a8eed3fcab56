"""Multiply rows by their experts' matrices: the down projection, input gradients, adapters.

The first projection, too, of experts without a gate or with gates and ups in turn: there the kernel
ends with the activation or the gate.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from megablocks_utils.kernels.fused.device_code import (
    add_low_rank,
    find_rows,
    multiply,
    read_order,
    swizzle,
)
from megablocks_utils.kernels.fused.gate_code import activate, apply_gate, halve, split_pairs
from megablocks_utils.kernels.fused.kernel_launch import (
    GateLayout,
    KernelLaunch,
    LoraRows,
    Routing,
)
from megablocks_utils.kernels.fused.matrices import AnyMatrix
from megablocks_utils.kernels.fused.rounding import round_to
from megablocks_utils.kernels.fused.tile import Tile
from megablocks_utils.kernels.fused.tile_walk import find_tile, list_experts

NARROW = tl.constexpr(128)
"""Columns of a tile that a walk stores at once; of a wider tile it does a quarter at a time."""

_NO_GATE = {"ACTIVATION": "none", "CLAMP": "none", "ALPHA": 1.0, "LIMIT": math.inf}


@triton.jit
def cut_wide(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the quarters of a tile of more columns than NARROW, or the one narrow tile."""
    if BLOCK_N > NARROW:
        left, right = halve(acc, BLOCK_M, BLOCK_N)
        parts = halve(left, BLOCK_M, BLOCK_N // 2) + halve(right, BLOCK_M, BLOCK_N // 2)
    else:
        parts = (acc,)
    return parts


@triton.jit
def finish_rows(
    acc,
    expert,
    rows,
    target,
    exists,
    first_col,
    out_ptr,
    gate_up_out_ptr,
    bias_ptr,
    adapter,
    num_cols,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    KEEP_GATE_UP_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    RANK_FITS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Scale a tile's product, add adapter and bias, apply the gate, store it as rows `target`."""
    cols = first_col + tl.arange(0, BLOCK_N)
    is_col = cols < num_cols
    # Before the adapter, whose rows were scaled when they were made.
    acc *= scale
    if HAS_LORA:
        acc = add_low_rank(
            *(acc, adapter, expert, rows, exists, cols, is_col, BLOCK_R, RANK_FITS),
            *(PRECISION, INTERPRET),
        )
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * num_cols + cols, mask=is_col, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    places = target[:, None] * num_cols + cols[None, :]
    mask = exists[:, None] & is_col[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    out = round_to(acc, dtype, INTERPRET)
    if KEEP_GATE_UP_OUT:
        tl.store(gate_up_out_ptr + places, out, mask=mask)
    # From the rounded values, as the backward pass will make it again.
    if GATED:
        gate, up = split_pairs(out.to(tl.float32), BLOCK_N // 2)
        results = round_to(apply_gate(gate, up, ACTIVATION, CLAMP, ALPHA, LIMIT), dtype, INTERPRET)
        num_pairs = num_cols // 2
        pairs = first_col // 2 + tl.arange(0, BLOCK_N // 2)
        tl.store(
            out_ptr + target[:, None] * num_pairs + pairs[None, :],
            results,
            mask=exists[:, None] & (pairs < num_pairs)[None, :],
        )
    else:
        if ACTIVATION != "none":
            out = round_to(activate(out.to(tl.float32), ACTIVATION, ALPHA), dtype, INTERPRET)
        tl.store(out_ptr + places, out, mask=mask)


# One program computes a tile of the result, for rows of one expert:
#
#   x (T, K) or (N, K)            weights of the expert (K, columns)         out (N, columns)
#   +------------------+              +-----+---------+-----+              +-----+------+-----+
#   | rows: by token   |              |     | BLOCK_N |     |              |     |      |     |
#   | (GATHER), or in  |  BLOCK_M  @  |     |         |     |  = acc  -->  |     | tile |     |
#   | expert order     |              |     |         |     |              |     |      |     |
#   +------------------+              +-----+---------+-----+              +-----+------+-----+
#                                                       in expert order, or by routed row (SCATTER)
#
#   registers  the accumulator; scale, adapter and bias are applied there before the one store. A
#              gate comes after them: its pairs are neighbours, and its tile has half the columns.
#              Its inputs are stored as well where a backward pass will need them
#   shared     `num_stages` steps of x and of the weights
#   HBM        SCATTER puts a token's K results side by side, where `combine` reads them in one
#              piece. Each row has one owner, so no two programs write to the same place
#   re-read    as `multiply` says
@triton.jit
def row_gemm_kernel(
    x_ptr,
    w,
    out_ptr,
    gate_up_out_ptr,
    order_ptr,
    offsets_ptr,
    bias_ptr,
    adapter,
    num_experts,
    num_k,
    num_cols,
    num_tiles_m,
    num_tiles_n,
    scale,
    stride_xm,
    strides,
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
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    KEEP_GATE_UP_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    LOAD: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Compute one tile of out[i] = scale * x[i] @ w[expert of i] + lora[i] @ factor + bias.

    `x` is read in expert order or, with GATHER, from the tokens; `out` is written in expert order
    or, with SCATTER, in the order of routed rows. An ACTIVATION other than "none", GATED or not,
    comes last.
    """
    if PERSISTENT:
        tl.assume(num_k > 0)  # so that the two loops can be one
        listed = list_experts(offsets_ptr, num_experts, num_tiles_n, EXPERTS_POW2, BLOCK_M)
        finished, step = tl.program_id(0), tl.num_programs(0)
        for tile in tl.range(finished, tl.max(listed[2], 0), step, flatten=True):
            expert, rows, exists, tile_n = find_tile(
                *(listed, tile, num_tiles_n, EXPERTS_POW2, BLOCK_M, GROUP_M)
            )
            source = rows.to(tl.int64)
            if GATHER:
                source = (read_order(order_ptr, rows, exists, HAS_ORDER) // TOP_K).to(tl.int32)
            acc = multiply(
                *(x_ptr, stride_xm, source, exists, w, strides, expert, tile_n * BLOCK_N),
                *(num_k, num_cols, BLOCK_M, BLOCK_N, BLOCK_K, LOAD, PRECISION, INTERPRET),
            )
            # Found again: by now the loads may have gone on to the next tile.
            expert, rows, exists, tile_n = find_tile(
                *(listed, finished, num_tiles_n, EXPERTS_POW2, BLOCK_M, GROUP_M)
            )
            finished += step
            target = rows.to(tl.int64)
            if SCATTER:
                target = read_order(order_ptr, rows, exists, HAS_ORDER)
            # Loads of the next tile are under way, and leave few registers.
            parts = cut_wide(acc, BLOCK_M, BLOCK_N)
            size: tl.constexpr = BLOCK_N // (4 if BLOCK_N > NARROW else 1)
            for i in tl.static_range(BLOCK_N // size):
                finish_rows(
                    *(parts[i], expert, rows, target, exists, tile_n * BLOCK_N + i * size),
                    *(out_ptr, gate_up_out_ptr, bias_ptr, adapter, num_cols, scale, size),
                    *(BLOCK_R, GATED, ACTIVATION, CLAMP, ALPHA, LIMIT),
                    *(KEEP_GATE_UP_OUT, HAS_BIAS, HAS_LORA, True, PRECISION, INTERPRET),
                )
    else:
        tile_m, tile_n = swizzle(tl.program_id(0), num_tiles_m, num_tiles_n, GROUP_M)
        expert, rows, exists = find_rows(offsets_ptr, tile_m, num_experts, EXPERTS_POW2, BLOCK_M)
        if expert >= num_experts:
            return  # the grid has more row tiles than these counts need
        routed = read_order(order_ptr, rows, exists, HAS_ORDER)
        source = routed // TOP_K if GATHER else rows.to(tl.int64)
        acc = multiply(
            *(x_ptr, stride_xm, source, exists, w, strides, expert, tile_n * BLOCK_N),
            *(num_k, num_cols, BLOCK_M, BLOCK_N, BLOCK_K, LOAD, PRECISION, INTERPRET),
        )
        target = routed if SCATTER else rows.to(tl.int64)
        finish_rows(
            *(acc, expert, rows, target, exists, tile_n * BLOCK_N, out_ptr, gate_up_out_ptr),
            *(bias_ptr, adapter, num_cols, scale, BLOCK_N, BLOCK_R),
            *(GATED, ACTIVATION, CLAMP, ALPHA, LIMIT, KEEP_GATE_UP_OUT, HAS_BIAS),
            *(HAS_LORA, False, PRECISION, INTERPRET),
        )


def row_gemm(
    x: Tensor,
    weights: AnyMatrix,
    routing: Routing,
    tile: Tile,
    *,
    gather: bool = False,
    scatter: bool = False,
    scale: float = 1.0,
    lora: LoraRows | None = None,
    bias: Tensor | None = None,
    layout: GateLayout | None = None,
    gate_up_out: Tensor | None = None,
) -> Tensor:
    """Multiply every routed row by its expert's matrix: (N, columns), or (N, I) through a gate.

    Args:
        x: (N, K) in expert order, or with `gather` (T, K) by token.
        weights: the experts' (K, columns).
        routing: which rows go to which expert.
        tile: sizes of a program's work.
        gather: read `x` by token.
        scatter: write routed rows, token by token, instead of expert order.
        scale: factor of the product.
        lora: a low-rank product to add, unscaled.
        bias: (L, columns), to add, unscaled.
        layout: the gate, of columns in turn, or the activation of all these.
        gate_up_out: (N, columns), filled with what that is given.
    """
    is_gated = layout is not None and layout.has_gate
    out = x.new_empty(routing.num_rows, weights.num_cols // (1 + is_gated))
    if routing.num_rows == 0:
        return out
    launch = KernelLaunch(weights, routing, tile, lora)
    row_gemm_kernel[(launch.count_programs(weights.num_cols),)](
        x,
        weights.argument(tile),
        out,
        gate_up_out,
        routing.order,
        routing.offsets,
        bias,
        launch.adapter_argument(),
        routing.num_experts,
        weights.num_rows,
        weights.num_cols,
        *launch.grid(weights.num_cols),
        scale,
        x.stride(0),
        weights.strides,
        PERSISTENT=launch.is_persistent,
        GATHER=gather,
        SCATTER=scatter,
        GATED=is_gated,
        KEEP_GATE_UP_OUT=gate_up_out is not None,
        HAS_BIAS=bias is not None,
        **(_NO_GATE if layout is None else layout.constants()),
        **launch.constants(),
    )
    return out
