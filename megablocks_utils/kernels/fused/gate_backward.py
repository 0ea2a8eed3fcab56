"""Backward through the down projection and the gate, to the router too: one kernel."""

from collections.abc import Sequence
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
    swizzle,
)
from megablocks_utils.kernels.fused.gate_code import backward_through_gate, halve
from megablocks_utils.kernels.fused.kernel_launch import (
    GateLayout,
    KernelLaunch,
    LoraRows,
    Routing,
)
from megablocks_utils.kernels.fused.matrices import AnyMatrix
from megablocks_utils.kernels.fused.tile import Tile


# One program computes BLOCK_N columns of I, for a row tile of one expert:
#
#   grad (T, H), by token        down projection transposed (H, I)
#   +------------------+            +-----+---------+-----+
#   | rows of the tile |  BLOCK_M @ |     | BLOCK_N |     |  + adapter  =  acc (BLOCK_M, BLOCK_N)
#   +------------------+            +-----+---------+-----+                |
#                                                                    parts of it, one by one
#   gate_up_out (N, 2 * I)                                                 v
#   +---+------+---+---+------+---+                  acc = gradient of act(gate) * up
#   |   | gate |   |   |  up  |   |  ----------->      * derivatives  -->  grad_gate_up (N, 2 * I)
#   +---+------+---+---+------+---+                    act(gate) * up * weight --> weighted (N, I)
#                                                      row sums of acc * act(gate) * up
#                                                                     -->  partial (column tile, N)
#
#   registers  the accumulator; then, some columns at a time, gate, up and what is made of them
#   shared     `num_stages` steps of grad and of the weights
#   HBM        reads gate_up_out once: each element belongs to one program. Writes what is wanted
#   re-read    grad and the weights, as `multiply` says
#   no gate    gate_up_out and grad_gate_up are (N, I), of up alone
#   order      a row's partial sums are added by column tile after the kernel: no atomics, so
#              results repeat bit for bit
@triton.jit
def gate_backward_kernel(
    grad_ptr,
    w,
    gate_up_out_ptr,
    weight_ptr,
    grad_gate_up_ptr,
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
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    KEEP_GRAD_GATE_UP: tl.constexpr,
    KEEP_WEIGHTED: tl.constexpr,
    KEEP_PARTIAL: tl.constexpr,
    HAS_LORA: tl.constexpr,
    LOAD: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Compute a tile of the gradient of the gate's inputs.

    `grad` is the output's gradient by token; the product with the weights, and with the adapter's
    factor, is the gradient of the gate's result before the routing weight. With the result itself,
    made again from `gate_up_out`, it gives the routing weight's gradient: each program leaves its
    columns' part in `partial`.
    """
    tile_m, tile_n = swizzle(tl.program_id(0), num_tiles_m, num_tiles_n, GROUP_M)
    expert, rows, exists = find_rows(offsets_ptr, tile_m, num_experts, EXPERTS_POW2, BLOCK_M)
    if expert >= num_experts:
        return  # the grid has more row tiles than these counts need
    routed = read_order(order_ptr, rows, exists, HAS_ORDER)
    source = routed // TOP_K
    first_col = tile_n * BLOCK_N
    acc = multiply(
        *(grad_ptr, stride_gm, source, exists, w, strides, expert, first_col, num_k, num_cols),
        *(BLOCK_M, BLOCK_N, BLOCK_K, LOAD, PRECISION, INTERPRET),
    )
    if HAS_LORA:
        cols = first_col + tl.arange(0, BLOCK_N)
        acc = add_low_rank(
            *(acc, adapter, expert, rows, exists, cols, cols < num_cols, BLOCK_R),
            *(False, PRECISION, INTERPRET),
        )
    # Some of the columns after others: for a whole tile, what follows would spill registers, and
    # with pairs to take apart for a half, too.
    left, right = halve(acc, BLOCK_M, BLOCK_N)
    if INTERLEAVED:
        parts = halve(left, BLOCK_M, BLOCK_N // 2) + halve(right, BLOCK_M, BLOCK_N // 2)
    else:
        parts = (left, right)
    size: tl.constexpr = BLOCK_N // (4 if INTERLEAVED else 2)
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    part = backward_through_gate(
        *(parts[0], first_col, rows, routed, exists, num_cols),
        *(gate_up_out_ptr, weight_ptr, grad_gate_up_ptr, weighted_ptr, size),
        *(GATED, INTERLEAVED, ACTIVATION, CLAMP, ALPHA, LIMIT),
        *(HAS_WEIGHTS, KEEP_GRAD_GATE_UP, KEEP_WEIGHTED, dtype, INTERPRET),
    )
    for i in tl.static_range(1, BLOCK_N // size):
        part += backward_through_gate(
            *(parts[i], first_col + i * size, rows, routed, exists, num_cols),
            *(gate_up_out_ptr, weight_ptr, grad_gate_up_ptr, weighted_ptr, size),
            *(GATED, INTERLEAVED, ACTIVATION, CLAMP, ALPHA, LIMIT),
            *(HAS_WEIGHTS, KEEP_GRAD_GATE_UP, KEEP_WEIGHTED, dtype, INTERPRET),
        )
    if KEEP_PARTIAL:
        tl.store(partial_ptr + tile_n.to(tl.int64) * num_rows + routed, part, mask=exists)


class Wanted(NamedTuple):
    """Say which of `GateGradients` are needed."""

    gate_up_out: bool
    weighted: bool
    top_k_weights: bool


@dataclass(frozen=True)
class GateGradients:
    """What comes out of the backward pass through the gate; None where it was not asked for.

    Attributes:
        gate_up_out: (N, F) gradient of the gate's inputs, in expert order.
        weighted: (N, I) the gate's results times their routing weights, in expert order.
        top_k_weights: (N,) fp32, gradient of the routing weights, by routed row; a bias of the down
            projection is not in it.
    """

    gate_up_out: Tensor | None
    weighted: Tensor | None
    top_k_weights: Tensor | None


def gate_backward(
    grad: Tensor,
    weights: AnyMatrix,
    gate_up_out: Tensor,
    top_k_weights: Tensor | None,
    routing: Routing,
    tile: Tile,
    layout: GateLayout,
    *,
    wanted: Wanted,
    lora: LoraRows | None = None,
) -> GateGradients:
    """Run the first half of the backward pass.

    Args:
        grad: (T, H) gradient of the layer's output.
        weights: the experts' (H, I): the down projection, transposed.
        gate_up_out: (N, F) that the first projection kept: F is 2 * I, or I without a gate.
        top_k_weights: (T, K) or None for ones.
        routing: which rows go to which expert.
        tile: sizes of a program's work.
        layout: order of the F values, and the gate.
        wanted: what is needed.
        lora: a low-rank product to add to the gradient of the gate's result.
    """
    num_rows, num_cols = routing.num_rows, weights.num_cols
    launch = KernelLaunch(weights, routing, tile, lora)
    tiles_m, tiles_n = launch.grid(num_cols)
    shapes = (num_rows, gate_up_out.shape[1]), (num_rows, num_cols), (tiles_n, num_rows)
    grad_gate_up, weighted, partial = _allocate(grad, shapes, wanted)
    if num_rows:
        gate_backward_kernel[(tiles_m * tiles_n,)](
            grad,
            weights.argument(tile),
            gate_up_out,
            top_k_weights,
            grad_gate_up,
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
            GATED=layout.has_gate,
            INTERLEAVED=layout.is_interleaved,
            KEEP_GRAD_GATE_UP=wanted.gate_up_out,
            KEEP_WEIGHTED=wanted.weighted,
            KEEP_PARTIAL=wanted.top_k_weights,
            **layout.constants(),
            **launch.constants(),
        )
    return GateGradients(grad_gate_up, weighted, None if partial is None else partial.sum(dim=0))


def _allocate(
    like: Tensor, shapes: Sequence[tuple[int, int]], wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Make room for what is wanted; of the routing weights' gradient, a part for each tile."""
    dtypes = like.dtype, like.dtype, torch.float32
    gate_up_out, weighted, partial = (
        like.new_empty(shape, dtype=dtype) if is_wanted else None
        for shape, dtype, is_wanted in zip(shapes, dtypes, wanted, strict=True)
    )
    return gate_up_out, weighted, partial
