"""Gather tokens, multiply them by gate and up at once, and apply the gate: one kernel."""

import triton
import triton.language as tl
from torch import Tensor

from megablocks_utils.kernels.fused.device_code import (
    add_low_rank,
    dot,
    find_rows,
    load_rows,
    read_order,
    swizzle,
)
from megablocks_utils.kernels.fused.gate_code import apply_gate
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
from megablocks_utils.kernels.fused.weight_tile import load_weights


@triton.jit
def multiply_both(
    x_ptr,
    stride_xm,
    source,
    exists,
    w,
    strides,
    expert,
    first_col,
    num_k,
    num_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Multiply rows by the same columns of gate and of up: the rows are loaded once for both."""
    is_col = first_col + tl.arange(0, BLOCK_N) < num_cols
    # Boxes and codes of gate's may reach into up's, which are masked when results are stored.
    all_cols, first_up = 2 * num_cols, first_col + num_cols
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Two accumulators and not one of twice the columns: the gate pairs their columns up, and values
    # of one accumulator cannot meet without passing through shared memory.
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_k in range(0, num_k, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, source, exists, k, num_k, stride_xm, LOAD.even_k)
        w_gate = load_weights(
            *(w, strides, expert, first_k, first_col, num_k, all_cols, is_col, dtype),
            *(BLOCK_N, BLOCK_K, LOAD, INTERPRET),
        )
        w_up = load_weights(
            *(w, strides, expert, first_k, first_up, num_k, all_cols, is_col, dtype),
            *(BLOCK_N, BLOCK_K, LOAD, INTERPRET),
        )
        gate = dot(x, w_gate, gate, PRECISION, INTERPRET)
        up = dot(x, w_up, up, PRECISION, INTERPRET)
    return gate, up


@triton.jit
def finish_gate_up(
    gate,
    up,
    expert,
    rows,
    exists,
    first_col,
    out_ptr,
    gate_up_out_ptr,
    bias_ptr,
    adapter,
    num_cols,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
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
    """Add adapter and bias to a tile's two products, apply the gate, and store the results."""
    cols = first_col + tl.arange(0, BLOCK_N)
    is_col = cols < num_cols
    up_cols = cols + num_cols
    # Its rows x @ A, (N, r), were made by a thin `row_gemm`: every column tile needs them.
    if HAS_LORA:
        gate = add_low_rank(
            *(gate, adapter, expert, rows, exists, cols, is_col, BLOCK_R),
            *(RANK_FITS, PRECISION, INTERPRET),
        )
        up = add_low_rank(
            *(up, adapter, expert, rows, exists, up_cols, is_col, BLOCK_R),
            *(RANK_FITS, PRECISION, INTERPRET),
        )
    if HAS_BIAS:
        bias_ptr += expert.to(tl.int64) * (2 * num_cols)
        gate += tl.load(bias_ptr + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + up_cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    gate, up = round_to(gate, dtype, INTERPRET), round_to(up, dtype, INTERPRET)
    mask = exists[:, None] & is_col[None, :]
    row_starts = rows.to(tl.int64)[:, None] * num_cols
    if KEEP_GATE_UP_OUT:
        tl.store(gate_up_out_ptr + 2 * row_starts + cols[None, :], gate, mask=mask)
        tl.store(gate_up_out_ptr + 2 * row_starts + up_cols[None, :], up, mask=mask)
    # From the rounded values, as the backward pass will make it again.
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    out = apply_gate(gate, up, ACTIVATION, CLAMP, ALPHA, LIMIT)
    out = round_to(out, dtype, INTERPRET)
    tl.store(out_ptr + row_starts + cols[None, :], out, mask=mask)


# One program computes the same columns of gate and of up, for a row tile of one expert:
#
#                          one expert's weights (H, 2 * I)
#                              |<------ I ------->|<------ I ------->|
#                          H   +-----+------+-----+-----+------+-----+
#      H ->                |   |     | gate |     |     |  up  |     |
#   +------------+         v   |     | cols |     |     | cols |     |
#   | tokens of  | BLOCK_M     +-----+------+-----+-----+------+-----+
#   | these rows |                   BLOCK_N            BLOCK_N
#   +------------+
#         |                          gate                up       fp32, (BLOCK_M, BLOCK_N) each
#    gathered by                       \                  /
#    order // K                     + adapter, + bias, rounded  -->  gate_up_out  (N, 2 * I)
#                                         \            /
#                                         act(gate) * up        -->  out          (N, I)
#
#   registers  both accumulators, and the adapter's and bias's parts that are added to them
#   shared     `num_stages` steps of tokens (BLOCK_M, BLOCK_K) and of both weights
#   HBM        reads tokens where they are: no permuted copy (N, H) is made. Writes `out`, and
#              `gate_up_out` only where a backward pass will need it
#   re-read    a token for each of its K experts and each of the I / BLOCK_N column tiles; weights
#              for each row tile of their expert, most of it from L2 (`swizzle`)
@triton.jit
def gate_up_kernel(
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
    """Compute a tile of out = gate(gate_up_out), gate_up_out = x @ w + lora @ factor + bias.

    The program owns the same BLOCK_N columns of gate and of up. `num_cols` is I.
    """
    if PERSISTENT:
        tl.assume(num_k > 0)  # so that the two loops can be one
        listed = list_experts(offsets_ptr, num_experts, num_tiles_n, EXPERTS_POW2, BLOCK_M)
        finished, step = tl.program_id(0), tl.num_programs(0)
        for tile in tl.range(finished, tl.max(listed[2], 0), step, flatten=True):
            expert, rows, exists, tile_n = find_tile(
                *(listed, tile, num_tiles_n, EXPERTS_POW2, BLOCK_M, GROUP_M)
            )
            source = (read_order(order_ptr, rows, exists, HAS_ORDER) // TOP_K).to(tl.int32)
            gate, up = multiply_both(
                *(x_ptr, stride_xm, source, exists, w, strides, expert, tile_n * BLOCK_N),
                *(num_k, num_cols, BLOCK_M, BLOCK_N, BLOCK_K, LOAD, PRECISION, INTERPRET),
            )
            # Found again: by now the loads may have gone on to the next tile.
            expert, rows, exists, tile_n = find_tile(
                *(listed, finished, num_tiles_n, EXPERTS_POW2, BLOCK_M, GROUP_M)
            )
            finished += step
            finish_gate_up(
                *(gate, up, expert, rows, exists, tile_n * BLOCK_N, out_ptr, gate_up_out_ptr),
                *(bias_ptr, adapter, num_cols, BLOCK_N, BLOCK_R, ACTIVATION, CLAMP, ALPHA, LIMIT),
                *(KEEP_GATE_UP_OUT, HAS_BIAS, HAS_LORA, True, PRECISION, INTERPRET),
            )
    else:
        tile_m, tile_n = swizzle(tl.program_id(0), num_tiles_m, num_tiles_n, GROUP_M)
        expert, rows, exists = find_rows(offsets_ptr, tile_m, num_experts, EXPERTS_POW2, BLOCK_M)
        if expert >= num_experts:
            return  # the grid has more row tiles than these counts need
        source = read_order(order_ptr, rows, exists, HAS_ORDER) // TOP_K
        gate, up = multiply_both(
            *(x_ptr, stride_xm, source, exists, w, strides, expert, tile_n * BLOCK_N),
            *(num_k, num_cols, BLOCK_M, BLOCK_N, BLOCK_K, LOAD, PRECISION, INTERPRET),
        )
        finish_gate_up(
            *(gate, up, expert, rows, exists, tile_n * BLOCK_N, out_ptr, gate_up_out_ptr),
            *(bias_ptr, adapter, num_cols, BLOCK_N, BLOCK_R, ACTIVATION, CLAMP, ALPHA, LIMIT),
            *(KEEP_GATE_UP_OUT, HAS_BIAS, HAS_LORA, False, PRECISION, INTERPRET),
        )


def gate_up(
    tokens: Tensor,
    weights: AnyMatrix,
    routing: Routing,
    tile: Tile,
    layout: GateLayout,
    *,
    keeps_gate_up_out: bool,
    lora: LoraRows | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the first half of the experts whose gates lie before their ups.

    Args:
        tokens: (T, H).
        weights: the experts' (H, 2 * I).
        routing: which rows go to which expert.
        tile: sizes of a program's work, its columns counted in I.
        layout: the gate.
        keeps_gate_up_out: whether the outputs before the gate are wanted.
        lora: a low-rank product to add to these.
        bias: (L, 2 * I), contiguous, to add to these.

    Returns:
        (N, I) in expert order, and (N, 2 * I) or None.
    """
    num_cols = weights.num_cols // 2
    out = tokens.new_empty(routing.num_rows, num_cols)
    gate_up_out = tokens.new_empty(routing.num_rows, 2 * num_cols) if keeps_gate_up_out else None
    if routing.num_rows == 0:
        return out, gate_up_out
    launch = KernelLaunch(weights, routing, tile, lora)
    gate_up_kernel[(launch.count_programs(num_cols),)](
        tokens,
        weights.argument(tile),
        out,
        gate_up_out,
        routing.order,
        routing.offsets,
        bias,
        launch.adapter_argument(),
        routing.num_experts,
        weights.num_rows,
        num_cols,
        *launch.grid(num_cols),
        tokens.stride(0),
        weights.strides,
        PERSISTENT=launch.is_persistent,
        KEEP_GATE_UP_OUT=keeps_gate_up_out,
        HAS_BIAS=bias is not None,
        **layout.constants(),
        **launch.constants(),
    )
    return out, gate_up_out
