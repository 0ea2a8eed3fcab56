"""Load a tile of an expert's weights in any way that they lie: plainly, in boxes, or in codes."""

from typing import NamedTuple

import triton
import triton.language as tl

from megablocks_utils.kernels.fused.rounding import round_to


class WeightLoad(NamedTuple):
    """How a kernel loads weights, which it is compiled for.

    Attributes:
        even_k: whether steps of a sum end where the weights do.
        k_is_last: whether what is summed over lies side by side.
        uses_tma: whether boxes are loaded by a descriptor.
        code_block: inputs that share the scale of their codes; 0 where numbers are stored.
        high_is_first: whether the first of a byte's two codes is in its upper bits.
    """

    even_k: bool
    k_is_last: bool
    uses_tma: bool = False
    code_block: int = 0
    high_is_first: bool = False


@triton.jit
def load_weights(
    w,
    strides,
    expert,
    first_k,
    first_col,
    num_k,
    num_cols,
    is_col,
    dtype: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Load weights (BLOCK_K, BLOCK_N) of an expert from row `first_k` and column `first_col`.

    `w` and `strides` are the `argument` and `strides` of a `Matrix` or `CodedMatrix`; `is_col` says
    which of the columns are wanted.
    """
    if LOAD.uses_tma:
        weights = load_box(w, expert, first_k, first_col, num_k, num_cols, LOAD.k_is_last)
    elif LOAD.code_block == 0:
        k = first_k + tl.arange(0, BLOCK_K)
        cols = first_col + tl.arange(0, BLOCK_N)
        weights = load_plain(w, strides, expert, k, cols, is_col, num_k, LOAD.even_k)
    elif LOAD.k_is_last:
        weights = look_up_codes(
            *(w, strides, expert, first_col, first_k, num_cols, num_k, dtype),
            *(BLOCK_N, BLOCK_K, LOAD.code_block, LOAD.high_is_first, INTERPRET),
        ).T
    else:
        weights = look_up_codes(
            *(w, strides, expert, first_k, first_col, num_k, num_cols, dtype),
            *(BLOCK_K, BLOCK_N, LOAD.code_block, LOAD.high_is_first, INTERPRET),
        )
    return weights


@triton.jit
def load_plain(w, strides, expert, k, cols, is_col, num_k, EVEN_K: tl.constexpr):
    """Load weights (K, N) of an expert by pointers: rows `k`, columns `cols`."""
    pointers = w + expert.to(tl.int64) * strides[0]
    pointers += k[:, None].to(tl.int64) * strides[2] + cols[None, :].to(tl.int64) * strides[1]
    mask = is_col[None, :]
    if not EVEN_K:
        mask = mask & (k < num_k)[:, None]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_box(w, expert, first_k, first_col, num_k, num_cols, K_IS_LAST: tl.constexpr):
    """Load the same by a tensor descriptor over (L * rows, columns) of the stored weights.

    A box may reach into the next expert: its columns are masked when results are stored, and along
    K the launcher only lets whole boxes through.
    """
    if K_IS_LAST:
        weights = w.load([expert * num_cols + first_col, first_k]).T
    else:
        weights = w.load([expert * num_k + first_k, first_col])
    return weights


# A tile of HIGH outputs and WIDE inputs, for blocks of WIDE / 2 inputs:
#
#     bytes (HIGH, WIDE / 2)      codes (HIGH, WIDE)            numbers, fp32              scales
#     +--+--+--+--+          +-+-+-+-+-+-+-+-+            +-+-+-+-+-+-+-+-+              +--+--+
#     |ab|cd|ef|gh|   -->    |a|b|c|d|e|f|g|h|  - table ->| | | | | | | | |  *  block by |  |  |
#     +--+--+--+--+          +-+-+-+-+-+-+-+-+            +-+-+-+-+-+-+-+-+       block  +--+--+
#       from HBM        halves side by side, no exchange     16 numbers, in L1      |
#                                                                                   v  rounded
#   registers  one tile of numbers                                      weights of the product
#   HBM        reads half a byte a weight, and the scales; no weight is ever written there
#   re-read    as other weights; each row tile of the expert looks them up again
@triton.jit
def look_up_codes(
    w,
    strides,
    expert,
    first_out,
    first_in,
    num_out,
    num_in,
    dtype: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    CODE_BLOCK: tl.constexpr,
    HIGH_IS_FIRST: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Make weights (HIGH outputs, WIDE inputs) of an expert from their codes, in `dtype`.

    Both firsts are multiples of the tile's sides, and so a side is whole blocks or within one. What
    is beyond `num_in` in its last block was packed as zeros.
    """
    codes_ptr, scales_ptr, table_ptr = w
    outs = first_out + tl.arange(0, HIGH)
    is_out = (outs < num_out)[:, None]
    places = first_in // 2 + tl.arange(0, WIDE // 2)
    starts = expert.to(tl.int64) * strides[0] + outs.to(tl.int64) * strides[1]
    pairs = tl.load(
        codes_ptr + starts[:, None] + places[None, :],
        mask=is_out & (2 * places < num_in)[None, :],
        other=0,
    )
    if HIGH_IS_FIRST:
        codes = tl.interleave(pairs >> 4, pairs & 15)
    else:
        codes = tl.interleave(pairs & 15, pairs >> 4)
    numbers = look_up(table_ptr, codes, INTERPRET)
    NUM_BLOCKS: tl.constexpr = max(1, WIDE // CODE_BLOCK)
    blocks = first_in // CODE_BLOCK + tl.arange(0, NUM_BLOCKS)
    starts = expert.to(tl.int64) * strides[2] + outs.to(tl.int64) * strides[3]
    scales = tl.load(
        scales_ptr + starts[:, None] + blocks[None, :],
        mask=is_out & (blocks * CODE_BLOCK < num_in)[None, :],
        other=0.0,
    )
    in_blocks = tl.reshape(numbers, (HIGH, NUM_BLOCKS, WIDE // NUM_BLOCKS)) * scales[:, :, None]
    return round_to(tl.reshape(in_blocks, (HIGH, WIDE)), dtype, INTERPRET)


@triton.jit
def look_up(table_ptr, codes, INTERPRET: tl.constexpr):
    """Return the entries of a table in fp32 that codes stand for."""
    if INTERPRET:
        numbers = tl.load(table_ptr + codes)
    else:
        # A load that leads to a product is pipelined: 4 bytes for each weight and step would lie in
        # shared memory. The compiler leaves this one where it is.
        numbers = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];",
            "=f,l",
            [(table_ptr + codes).to(tl.int64)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return numbers
