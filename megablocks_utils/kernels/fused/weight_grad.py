"""Sum outer products of rows by expert: the gradients of weights, adapters and biases."""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from megablocks_utils.kernels.fused.device_code import dot, load_rows, read_order
from megablocks_utils.kernels.fused.kernel_launch import Routing, compile_options
from megablocks_utils.kernels.fused.rounding import round_to
from megablocks_utils.kernels.fused.tile import Tile

_MAX_SPLITS = 16
_FEW_SUMS = 64 * 64
"""Sums of a program, made by tensor cores, that 4 warps hold without spills and 8 do not."""


# One program computes a tile of one expert's sum, over all its rows or over one share of them:
#
#        rows of the expert ->                              columns of y (num_y)
#   x^T +-----+-----+-----+- -       y +------------+        +---+---------+---+
#       |step |step |step |            | step       |        |   |         |   |
#       |     |     |     |  BLOCK_M @ | BLOCK_K    |   =    |   |  tile   |   | columns of x
#       +-----+-----+-----+- -         | rows       |        |   |         |   | (num_x)
#        BLOCK_K rows a step           +------------+        +---+---------+---+
#                                      | step       |          out[split, expert]
#
#   grid       (tiles of out, experts, SPLITS)
#   registers  the accumulator (BLOCK_M, BLOCK_N), over all steps
#   shared     `num_stages` steps of x and y; x is transposed on its way into the product
#   HBM        rows of x or y may be gathered from the tokens, so that no copy (N, H) exists
#   re-read    x once for each column tile of y, y once for each of x
#   SPLITS     few tiles (adapters, biases, few experts) would leave most of the GPU idle; shares of
#              the rows give it work, each with an fp32 sum of its own that is added in order
@triton.jit
def weight_grad_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    num_x,
    num_y,
    num_tiles_x,
    num_tiles_y,
    stride_xm,
    stride_ym,
    strides,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    GATHER_X: tl.constexpr,
    GATHER_Y: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Compute a tile of out[e] = sum over an expert's rows i of x[i]^T y[i].

    One program owns the whole sum of its tile, or, with SPLITS, the part of one share of the rows,
    in a place of its own. An expert without rows gets zeros.
    """
    tile = tl.program_id(0)
    expert = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    if SPLITS > 1:
        # Whole steps: only the last share of an expert may end inside one.
        share = tl.cdiv(tl.cdiv(end - start, SPLITS), BLOCK_K) * BLOCK_K
        start += split * share
        end = tl.minimum(end, start + share)
    # Rows of tiles side by side share `y`, which L2 holds.
    cols_x = tile % num_tiles_x * BLOCK_M + tl.arange(0, BLOCK_M)
    cols_y = tile // num_tiles_x * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        exists = rows < end
        token = read_order(order_ptr, rows, exists, HAS_ORDER) // TOP_K
        in_order = rows.to(tl.int64)
        x_rows, y_rows = token if GATHER_X else in_order, token if GATHER_Y else in_order
        # Masked rows are zero on both sides and add nothing to the sum.
        x = load_rows(x_ptr, x_rows, exists, cols_x, num_x, stride_xm, False)
        y = load_rows(y_ptr, y_rows, exists, cols_y, num_y, stride_ym, False)
        acc = dot(x.T, y, acc, PRECISION, INTERPRET)
    # Also without a row: the gradient of an expert that got none is zero, not whatever was there.
    stride_split, stride_e, stride_x, stride_y = strides
    out_ptr += split.to(tl.int64) * stride_split + expert * stride_e
    places = cols_x[:, None].to(tl.int64) * stride_x + cols_y[None, :].to(tl.int64) * stride_y
    tl.store(
        out_ptr + places,
        round_to(acc, out_ptr.dtype.element_ty, INTERPRET),
        mask=(cols_x < num_x)[:, None] & (cols_y < num_y)[None, :],
    )


@dataclass(frozen=True)
class Operand:
    """Rows of one side of the products.

    Attributes:
        rows: (N, columns) in expert order, or (T, columns) by token where `by_token`.
        by_token: whether rows are gathered from the tokens.
    """

    rows: Tensor
    by_token: bool = False

    @classmethod
    def of(cls, rows: Tensor | None, *, by_token: bool = False) -> "Operand | None":
        """Return rows as an operand; None for rows that no gradient needs."""
        return None if rows is None else cls(rows, by_token)


def weight_grad(
    x: Operand,
    y: Operand,
    out: Tensor,
    routing: Routing,
    tile: Tile,
    *,
    num_programs: int,
    is_transposed: bool = False,
) -> Tensor:
    """Fill `out` (L, columns of x, columns of y) with every expert's sum of x^T y.

    Args:
        x: left side.
        y: right side.
        out: filled and returned; (L, columns of y, columns of x) where `is_transposed`.
        routing: which rows belong to which expert.
        tile: `block_m` columns of x, `block_n` columns of y, `block_k` rows at a time.
        num_programs: how many keep the device busy; with fewer, the rows of an expert are shared
            out among several, which leave their sums in fp32 to be added in order.
        is_transposed: how `out` lies.
    """
    num_x, num_y = x.rows.shape[1], y.rows.shape[1]
    block_x, block_y = _fit_block(tile.block_m, num_x), _fit_block(tile.block_n, num_y)
    tiles_x, tiles_y = triton.cdiv(num_x, block_x), triton.cdiv(num_y, block_y)
    splits = _count_splits(tiles_x * tiles_y * routing.num_experts, routing, tile, num_programs)
    sums = out.unsqueeze(0)
    if splits > 1:
        sums = out.new_empty(splits, *out.shape, dtype=torch.float32)
    strides = sums.mT.stride() if is_transposed else sums.stride()
    is_small = x.rows.element_size() == 2 and block_x * block_y <= _FEW_SUMS
    weight_grad_kernel[(tiles_x * tiles_y, routing.num_experts, splits)](
        x.rows,
        y.rows,
        sums,
        routing.order,
        routing.offsets,
        num_x,
        num_y,
        tiles_x,
        tiles_y,
        x.rows.stride(0),
        y.rows.stride(0),
        strides,
        TOP_K=routing.top_k,
        BLOCK_M=block_x,
        BLOCK_N=block_y,
        BLOCK_K=tile.block_k,
        SPLITS=splits,
        HAS_ORDER=routing.order is not None,
        GATHER_X=x.by_token,
        GATHER_Y=y.by_token,
        **compile_options(_fit_program(tile, routing, is_small=is_small)),
    )
    return out.copy_(sums.sum(dim=0)) if splits > 1 else out


def _fit_program(tile: Tile, routing: Routing, *, is_small: bool) -> Tile:
    """Return the tile with warps for few sums, and as many steps in shared memory as it says.

    Where rows are looked up, Triton gives the load of the order every second stage: 3 of them, and
    4, keep 2 steps of rows.
    """
    stages = tile.num_stages if routing.order is None else 2 * tile.num_stages - 1
    return replace(tile, num_warps=4 if is_small else tile.num_warps, num_stages=stages)


def _fit_block(block: int, size: int) -> int:
    """Return a block that is not much wider than a thin operand; dot wants 16 at least."""
    return min(block, max(16, triton.next_power_of_2(size)))


def _count_splits(num_tiles: int, routing: Routing, tile: Tile, num_programs: int) -> int:
    """Return into how many shares an expert's rows go; a power of two, so that few are compiled."""
    wanted = min(num_programs // num_tiles, routing.num_rows // (4 * tile.block_k), _MAX_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)
