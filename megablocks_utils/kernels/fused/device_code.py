"""What the Triton kernels share: finding a tile's rows, products.

Offsets into tensors are int64 throughout: N * 2I passes 2**31 at 75 thousand rows of Mixtral.
Arguments that belong together travel as tuples: `strides` (expert, column, row) of weights, and
`adapter` (LoRA rows, factor, rank, and the factor's strides).
"""

import triton
import triton.language as tl

from megablocks_utils.kernels.fused.weight_tile import load_plain, load_weights


# Order of the programs over row tiles (down) and column tiles (right), for GROUP_M = 4:
#
#        c0   c1   c2
#   r0 |  0    4    8      A column tile's weights are read from HBM by the first program of its
#   r1 |  1    5    9      group and from L2 by the other three. Row by row, all weights of the
#   r2 |  2    6   10      expert would pass through L2 between two uses of the same ones.
#   r3 |  3    7   11
#      +--------------
#   r4 | 12   16   20      The last group may have fewer rows.
#   r5 | 13   17   21
@triton.jit
def swizzle(pid, num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """Order the tiles so that GROUP_M row tiles use a column tile's weights while L2 holds them."""
    per_group = GROUP_M * num_tiles_n
    first_m = pid // per_group * GROUP_M
    size_m = tl.minimum(num_tiles_m - first_m, GROUP_M)
    within = pid % per_group
    return first_m + within % size_m, within // size_m


# Row tiles for BLOCK_M = 4 and experts with 6, 0 and 3 rows:
#
#   sorted rows   | 0 1 2 3 4 5 | 6 7 8 |
#   expert        |      0      |   2   |      expert 1 has no rows and so no tile
#   row tiles     [   0   ][ 1 .][  2  .]      . is masked; tiles 3, 4, ... find no expert and end
#
# Counts stay on the device: reading them back would stop the host in every layer. So the grid has
# as many tiles as there can be, and each program looks its own up in the L + 1 offsets.
@triton.jit
def find_rows(offsets_ptr, tile_m, num_experts, EXPERTS_POW2: tl.constexpr, BLOCK_M: tl.constexpr):
    """Find the expert and the sorted rows of a row tile; a tile never spans two experts.

    `offsets_ptr` holds the L + 1 int32 ends of experts' rows. The grid has as many row tiles as
    there can be; for those past the last one the expert is `num_experts` or more.

    Returns:
        The expert, its rows of this tile, and which of them exist.
    """
    experts = tl.arange(0, EXPERTS_POW2)
    is_expert = experts < num_experts
    start = tl.load(offsets_ptr + experts, mask=is_expert, other=0)
    end = tl.load(offsets_ptr + experts + 1, mask=is_expert, other=0)
    tiles = tl.cdiv(end - start, BLOCK_M)
    tiles_end = tl.cumsum(tiles, 0)
    # An expert without tiles ends where the one before it does, and so is passed over.
    expert = tl.sum((tiles_end <= tile_m).to(tl.int32), 0)
    # A sum over a mask takes one element out of a tensor, which cannot be indexed in registers.
    is_it = experts == expert
    first_row = tl.sum(tl.where(is_it, start + (tile_m - tiles_end + tiles) * BLOCK_M, 0), 0)
    rows = first_row + tl.arange(0, BLOCK_M)
    return expert, rows, rows < tl.sum(tl.where(is_it, end, 0), 0)


@triton.jit
def read_order(order_ptr, rows, exists, HAS_ORDER: tl.constexpr):
    """Return the routed row (token * K + slot) of sorted rows, as int64."""
    routed = rows.to(tl.int64)
    # Rows that came from other ranks are sorted already and have no order.
    if HAS_ORDER:
        routed = tl.load(order_ptr + rows, mask=exists, other=0).to(tl.int64)
    return routed


@triton.jit
def load_rows(x_ptr, source, exists, k, num_k, stride_m, EVEN_K: tl.constexpr):
    """Load columns `k` of rows `source` of a matrix whose columns lie side by side."""
    mask = exists[:, None]
    # Where K is a multiple of BLOCK_K the mask is one of rows alone, and loads are wide.
    if not EVEN_K:
        mask = mask & (k < num_k)[None, :]
    starts = source.to(tl.int64)[:, None] * stride_m
    return tl.load(x_ptr + starts + k[None, :], mask=mask, other=0.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Add a @ b to acc in fp32; the interpreter cannot multiply bf16 (triton#11584)."""
    if INTERPRET:
        # Exact: the product of two bf16 numbers fits in fp32.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


# The product that `row_gemm` and `gate_backward` begin with, one tile of the result a program:
#
#                                 K   +---------+  one expert's weights, BLOCK_N columns
#                                 |   | w step  |
#                                 v   +---------+
#      K ->                           |         |
#   +----------+------+               +---------+
#   | x step   |      |  BLOCK_M  @   ...            =  acc (BLOCK_M, BLOCK_N), fp32
#   +----------+------+  rows
#
#   registers  acc, from the first step of K to the last: it is never written between
#   shared     x and w of `num_stages` steps, loaded while earlier ones are multiplied
#   re-read    rows of x once for each column tile, w once for each row tile of its expert: L2
#              serves most of it in the order of `swizzle`
@triton.jit
def multiply(
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
    """Multiply rows `source` of x by BLOCK_N columns of an expert's weights, in fp32."""
    is_col = first_col + tl.arange(0, BLOCK_N) < num_cols
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_k in range(0, num_k, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        x = load_rows(x_ptr, source, exists, k, num_k, stride_xm, LOAD.even_k)
        weights = load_weights(
            *(w, strides, expert, first_k, first_col, num_k, num_cols, is_col, dtype),
            *(BLOCK_N, BLOCK_K, LOAD, INTERPRET),
        )
        acc = dot(x, weights, acc, PRECISION, INTERPRET)
    return acc


@triton.jit
def add_low_rank(
    acc,
    adapter,
    expert,
    rows,
    exists,
    cols,
    is_col,
    BLOCK_R: tl.constexpr,
    RANK_FITS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Add LoRA rows (N, r), which are scaled, @ factor (r, columns) of an expert to acc.

    RANK_FITS promises a rank of BLOCK_R at most, so that there is no loop.
    """
    if RANK_FITS:
        acc = add_ranks(
            *(acc, adapter, 0, expert, rows, exists, cols, is_col, BLOCK_R, PRECISION, INTERPRET)
        )
    else:
        # One step for ranks up to 64: `block_rank` makes them one block.
        for first in range(0, adapter[2], BLOCK_R):
            acc = add_ranks(
                *(acc, adapter, first, expert, rows, exists, cols, is_col, BLOCK_R),
                *(PRECISION, INTERPRET),
            )
    return acc


@triton.jit
def add_ranks(
    acc,
    adapter,
    first,
    expert,
    rows,
    exists,
    cols,
    is_col,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Add the product of BLOCK_R ranks of an adapter to acc."""
    lora_rows_ptr, factor_ptr, rank, strides = adapter
    ranks = first + tl.arange(0, BLOCK_R)
    lora_rows = load_rows(lora_rows_ptr, rows.to(tl.int64), exists, ranks, rank, rank, False)
    factor = load_plain(factor_ptr, strides, expert, ranks, cols, is_col, rank, False)
    return dot(lora_rows, factor, acc, PRECISION, INTERPRET)
