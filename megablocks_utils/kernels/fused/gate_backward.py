"""Go back through the down projection and the gate, to the router too: one kernel."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megablocks_utils.kernels.fused.device_code import (
    add_low_rank,
    find_rows,
    multiply,
    read_order,
    round_to,
    swizzle,
)
from megablocks_utils.kernels.fused.kernel_launch import (
    GateLayout,
    KernelLaunch,
    LoraRows,
    Matrix,
    Routing,
)
from megablocks_utils.kernels.fused.tiles import Tile


@triton.jit
def differentiate_gate(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Return `SwiGlu` of gate and up in fp32, and its derivatives by gate and by up."""
    inside_gate = gate == gate
    inside_up = inside_gate
    if LIMIT > 0:
        inside_gate = gate <= LIMIT
        inside_up = (up >= -LIMIT) & (up <= LIMIT)
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
    sigmoid = tl.sigmoid(ALPHA * gate)
    by_up = gate * sigmoid
    by_gate = up * sigmoid * (1.0 + ALPHA * gate * (1.0 - sigmoid))
    return by_up * up, tl.where(inside_gate, by_gate, 0.0), tl.where(inside_up, by_up, 0.0)


@triton.jit
def halve(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cut a tile into its left and its right columns."""
    halves = tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2))
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def go_through_gate(
    grad,
    first_col,
    rows,
    routed,
    exists,
    num_cols,
    hidden_ptr,
    weight_ptr,
    grad_hidden_ptr,
    weighted_ptr,
    BLOCK_N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    KEEP_GRAD_HIDDEN: tl.constexpr,
    KEEP_WEIGHTED: tl.constexpr,
    dtype: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Turn the gradient of some columns of the gate's results into that of its inputs.

    Returns:
        Each row's part of the routing weight's gradient.
    """
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = exists[:, None] & (cols < num_cols)[None, :]
    gate_cols = (2 * cols if INTERLEAVED else cols)[None, :]
    up_cols = (2 * cols + 1 if INTERLEAVED else cols + num_cols)[None, :]
    row_starts = rows.to(tl.int64)[:, None] * num_cols
    gate = tl.load(hidden_ptr + 2 * row_starts + gate_cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(hidden_ptr + 2 * row_starts + up_cols, mask=mask, other=0.0).to(tl.float32)
    result, by_gate, by_up = differentiate_gate(gate, up, ALPHA, LIMIT)
    part = tl.sum(tl.where(mask, grad * result, 0.0), 1)
    if HAS_WEIGHTS:
        weight = tl.load(weight_ptr + routed, mask=exists, other=0.0).to(tl.float32)[:, None]
        grad *= weight
        result *= weight
    if KEEP_WEIGHTED:
        result = round_to(result, dtype, INTERPRET)
        tl.store(weighted_ptr + row_starts + cols[None, :], result, mask=mask)
    if KEEP_GRAD_HIDDEN:
        by_gate = round_to(grad * by_gate, dtype, INTERPRET)
        by_up = round_to(grad * by_up, dtype, INTERPRET)
        tl.store(grad_hidden_ptr + 2 * row_starts + gate_cols, by_gate, mask=mask)
        tl.store(grad_hidden_ptr + 2 * row_starts + up_cols, by_up, mask=mask)
    return part


@triton.jit
def gate_backward_kernel(
    grad_ptr,
    w,
    hidden_ptr,
    weight_ptr,
    grad_hidden_ptr,
    weighted_ptr,
    partial_ptr,
    order_ptr,
    offsets_ptr,
    adapter,
    num_rows,
    num_experts,
    num_k,
    num_cols,
    num_tiles_m,
    num_tiles_n,
    stride_gm,
    strides,
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
    HAS_WEIGHTS: tl.constexpr,
    KEEP_GRAD_HIDDEN: tl.constexpr,
    KEEP_WEIGHTED: tl.constexpr,
    KEEP_PARTIAL: tl.constexpr,
    HAS_LORA: tl.constexpr,
    EVEN_K: tl.constexpr,
    USE_TMA: tl.constexpr,
    K_IS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Compute a tile of the gradient of the gate's inputs.

    `grad` is the output's gradient by token; the product with the weights, and with the adapter's
    factor, is the gradient of the gate's result before the routing weight. With the result itself,
    made again from `hidden`, it gives the routing weight's gradient: each program leaves its
    columns' part in `partial`.
    """
    tile_m, tile_n = swizzle(tl.program_id(0), num_tiles_m, num_tiles_n, GROUP_M)
    expert, rows, exists = find_rows(offsets_ptr, tile_m, num_experts, EXPERTS_POW2, BLOCK_M)
    if expert >= num_experts:
        return
    routed = read_order(order_ptr, rows, exists, HAS_ORDER)
    source = routed // TOP_K
    first_col = tile_n * BLOCK_N
    acc = multiply(
        *(grad_ptr, stride_gm, source, exists, w, strides, expert, first_col, num_k, num_cols),
        *(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, USE_TMA, K_IS_LAST, PRECISION, INTERPRET),
    )
    if HAS_LORA:
        cols = first_col + tl.arange(0, BLOCK_N)
        acc = add_low_rank(
            *(acc, adapter, expert, rows, exists, cols, cols < num_cols, BLOCK_R),
            *(PRECISION, INTERPRET),
        )
    # Half the columns after the other: what follows does not fit in registers for a whole tile.
    left, right = halve(acc, BLOCK_M, BLOCK_N)
    half: tl.constexpr = BLOCK_N // 2
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    part = go_through_gate(
        *(left, first_col, rows, routed, exists, num_cols),
        *(hidden_ptr, weight_ptr, grad_hidden_ptr, weighted_ptr, half, INTERLEAVED, ALPHA, LIMIT),
        *(HAS_WEIGHTS, KEEP_GRAD_HIDDEN, KEEP_WEIGHTED, dtype, INTERPRET),
    )
    part += go_through_gate(
        *(right, first_col + half, rows, routed, exists, num_cols),
        *(hidden_ptr, weight_ptr, grad_hidden_ptr, weighted_ptr, half, INTERLEAVED, ALPHA, LIMIT),
        *(HAS_WEIGHTS, KEEP_GRAD_HIDDEN, KEEP_WEIGHTED, dtype, INTERPRET),
    )
    if KEEP_PARTIAL:
        tl.store(partial_ptr + tile_n.to(tl.int64) * num_rows + routed, part, mask=exists)


class Wanted(NamedTuple):
    """Say which of `GateGradients` are needed."""

    hidden: bool
    weighted: bool
    top_k_weights: bool


@dataclass(frozen=True)
class GateGradients:
    """What comes out on the way back through the gate; None where it was not asked for.

    Attributes:
        hidden: (N, 2 * I) gradient of the gate's inputs, in expert order.
        weighted: (N, I) the gate's results times their routing weights, in expert order.
        top_k_weights: (N,) fp32, gradient of the routing weights, by routed row; a bias of the down
            projection is not in it.
    """

    hidden: Tensor | None
    weighted: Tensor | None
    top_k_weights: Tensor | None


def gate_backward(
    grad: Tensor,
    weights: Matrix,
    hidden: Tensor,
    top_k_weights: Tensor | None,
    routing: Routing,
    tile: Tile,
    layout: GateLayout,
    *,
    wanted: Wanted,
    inner: LoraRows | None = None,
) -> GateGradients:
    """Run the first half of the way back.

    Args:
        grad: (T, H) gradient of the layer's output.
        weights: the experts' (H, I): the down projection, transposed.
        hidden: (N, 2 * I) that `gate_up` kept.
        top_k_weights: (T, K) or None for ones.
        routing: which rows go to which expert.
        tile: sizes of a program's work.
        layout: order of the 2 * I values, and the gate.
        wanted: what is needed.
        inner: a low-rank product to add to the gradient of the gate's result.
    """
    num_rows, num_cols = routing.num_rows, weights.num_cols
    launch = KernelLaunch(weights, routing, tile, inner)
    tiles_m, tiles_n = launch.grid(num_cols)
    grad_hidden, weighted, partial = _allocate(grad, num_rows, num_cols, tiles_n, wanted)
    if num_rows:
        gate_backward_kernel[(tiles_m * tiles_n,)](
            grad,
            launch.weights_argument(),
            hidden,
            top_k_weights,
            grad_hidden,
            weighted,
            partial,
            routing.order,
            routing.offsets,
            launch.adapter_argument(),
            num_rows,
            routing.num_experts,
            weights.num_rows,
            num_cols,
            tiles_m,
            tiles_n,
            grad.stride(0),
            weights.strides,
            HAS_WEIGHTS=top_k_weights is not None,
            KEEP_GRAD_HIDDEN=wanted.hidden,
            KEEP_WEIGHTED=wanted.weighted,
            KEEP_PARTIAL=wanted.top_k_weights,
            **layout.constants(),
            **launch.constants(),
        )
    return GateGradients(grad_hidden, weighted, None if partial is None else partial.sum(dim=0))


def _allocate(
    like: Tensor, num_rows: int, num_cols: int, num_tiles_n: int, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Make room for what is wanted; of the routing weights' gradient, a part for each tile."""
    shapes = (num_rows, 2 * num_cols), (num_rows, num_cols), (num_tiles_n, num_rows)
    dtypes = like.dtype, like.dtype, torch.float32
    hidden, weighted, partial = (
        like.new_empty(shape, dtype=dtype) if is_wanted else None
        for shape, dtype, is_wanted in zip(shapes, dtypes, wanted, strict=True)
    )
    return hidden, weighted, partial
