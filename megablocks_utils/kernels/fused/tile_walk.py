"""Persistent programs: a fixed number of them, each of which computes many tiles in turn.

A program of one tile loads nothing during its epilogue, and large tiles leave no room for a second
program on the same processor that could. A persistent one loads the next tile's first steps then:
the loops over tiles and over K are one to the compiler (`flatten`).

Not `warp_specialize`: with Triton 3.9 it fails on sm_100 with an adapter in the epilogue, and on
sm_90 with rows that are loaded by pointers, as gathered ones are (triton#9728).
"""

import triton
import triton.language as tl

from megablocks_utils.kernels.fused.device_code import swizzle


# The walk of three programs (a, b, c) for GROUP_M = 2, over experts with 3, 0 and 1 row tiles and
# 2 column tiles each:
#
#                   c0     c1
#   expert 0   r0 | 0 a    2 c     The tiles of an expert come one after the other, and within it
#              r1 | 1 b    3 a     GROUP_M row tiles share a column tile's weights, as in `swizzle`.
#                 +------------    A group never crosses to the next expert, whose weights are
#              r2 | 4 b    5 c     others.
#                 +============
#   expert 2   r0 | 6 a    7 b     Only tiles that exist are counted: no program ends early.
@triton.jit
def list_experts(
    offsets_ptr, num_experts, num_tiles_n, EXPERTS_POW2: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Return every expert's first row, its end, and where its tiles end in the walk."""
    experts = tl.arange(0, EXPERTS_POW2)
    is_expert = experts < num_experts
    start = tl.load(offsets_ptr + experts, mask=is_expert, other=0)
    end = tl.load(offsets_ptr + experts + 1, mask=is_expert, other=0)
    return start, end, tl.cumsum(tl.cdiv(end - start, BLOCK_M), 0) * num_tiles_n


@triton.jit
def find_tile(
    listed,
    tile,
    num_tiles_n,
    EXPERTS_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Find a tile of the walk among what `list_experts` returned.

    Returns:
        Its expert, its rows, which of them exist, and its column tile.
    """
    start, end, tiles_end = listed
    # An expert without tiles ends where the one before it does, and so is passed over.
    expert = tl.sum((tiles_end <= tile).to(tl.int32), 0)
    is_it = tl.arange(0, EXPERTS_POW2) == expert
    first_row = tl.sum(tl.where(is_it, start, 0), 0)
    end_row = tl.sum(tl.where(is_it, end, 0), 0)
    num_tiles_m = tl.cdiv(end_row - first_row, BLOCK_M)
    first_tile = tl.sum(tl.where(is_it, tiles_end, 0), 0) - num_tiles_m * num_tiles_n
    tile_m, tile_n = swizzle(tile - first_tile, num_tiles_m, num_tiles_n, GROUP_M)
    rows = first_row + tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    return expert, rows, rows < end_row, tile_n
