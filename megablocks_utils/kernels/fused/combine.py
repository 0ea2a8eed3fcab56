"""Sum the K rows of each token, weighted or not, in the order of tokens or of experts."""

import triton
import triton.language as tl
from torch import Tensor

from megablocks_utils.kernels.device import is_interpreted
from megablocks_utils.kernels.fused.rounding import round_to

_MAX_BLOCK = 2048


# One program sums BLOCK columns of one token's K rows, which lie side by side, or where `inverse`
# says:
#
#   rows (N, H)                      out (T, H)
#   token 0 slot 0  |    |####|      token 0  |    |####|      program (0, 1)
#           slot 1  |    |####|
#   token 1 slot 0  |    |    |      token 1  |    |    |
#           slot 1  |    |    |
#
#   registers  the fp32 sum (BLOCK,); shared memory is not used
#   HBM        every row is read once and every result written once: bound by bandwidth alone
@triton.jit
def combine_kernel(
    rows_ptr,
    weight_ptr,
    inverse_ptr,
    out_ptr,
    num_cols,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_INVERSE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Add up the K rows of one token in fp32, always in the order of its slots."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_col = cols < num_cols
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    # In fp32 whatever the rows are: rounding after each slot would add K errors up.
    for slot in range(TOP_K):
        routed = token * TOP_K + slot
        place = routed
        if HAS_INVERSE:
            place = tl.load(inverse_ptr + routed).to(tl.int64)
        row = tl.load(rows_ptr + place * num_cols + cols, mask=is_col, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            row *= tl.load(weight_ptr + routed).to(tl.float32)
        acc += row
    out = round_to(acc, out_ptr.dtype.element_ty, INTERPRET)
    tl.store(out_ptr + token * num_cols + cols, out, mask=is_col)


def combine(
    rows: Tensor, top_k_weights: Tensor | None, top_k: int, inverse: Tensor | None = None
) -> Tensor:
    """Sum each token's K routed rows.

    Args:
        rows: (N, H) by routed row, those of a token lying together; or in expert order.
        top_k_weights: (T, K), contiguous; None sums as they are.
        top_k: K.
        inverse: (N,) place of each routed row in expert order; None where they lie by routed row.

    Returns:
        (T, H); `rows` themselves where there is nothing to do.
    """
    if top_k == 1 and top_k_weights is None and inverse is None:
        return rows  # received rows are weighted where they came from
    num_tokens, num_cols = rows.shape[0] // top_k, rows.shape[1]
    out = rows.new_empty(num_tokens, num_cols)
    if num_tokens == 0:
        return out
    block = min(triton.next_power_of_2(num_cols), _MAX_BLOCK)
    combine_kernel[(num_tokens, triton.cdiv(num_cols, block))](
        rows,
        top_k_weights,
        inverse,
        out,
        num_cols,
        TOP_K=top_k,
        BLOCK=block,
        HAS_WEIGHTS=top_k_weights is not None,
        HAS_INVERSE=inverse is not None,
        INTERPRET=is_interpreted(),
        enable_fp_fusion=True,
    )
    return out
