"""AdamW on one parameter in one kernel: every number is read once and written once.

Written with torch's operators, the same update with bfloat16 weights and states reads and writes
about 300 bytes a parameter, most of them float32 copies and random numbers; this kernel 14.
"""

import triton
import triton.language as tl
from torch import Tensor

from megablocks_utils.kernels.adamw_step import AdamWStep
from megablocks_utils.kernels.device import is_interpreted
from megablocks_utils.kernels.fused.rounding import round_to

__all__ = ["PAIRS", "ROUNDS", "run_adamw"]

PAIRS = 512
"""Pairs of elements of a program. Which random bits an element gets depends on it."""

ROUNDS = 7
"""Of Philox 4x32: the fewest that pass all of TestU01's BigCrush (Salmon et al., SC11, table 2)."""


# A program updates 2 * PAIRS elements, in two halves that lie one behind the other:
#
#   elements   | 0 ... PAIRS-1 | PAIRS ... 2*PAIRS-1 |      program 0
#                     a                  b                  one Philox block for each pair (a, b)
#
#   Philox     r0          r1          r2          r3       four words of 32 random bits
#              m of a      w of a      m of b      w of b   lower 16 bits: rounds m, w
#              v of a                  v of b               upper 16 bits: rounds v
#
#   registers  one half at a time in fp32; shared memory is not used
#   HBM        gradient, both moments and weight are read once; moments and weight written once
@triton.jit(do_not_specialize=["seed"])
def adamw_kernel(
    weight_ptr,
    gradient_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    num_elements,
    seed,
    numbers,
    PAIRS: tl.constexpr,
    ROUNDS: tl.constexpr,
    IS_WEIGHT_STOCHASTIC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Make a step of AdamW in fp32, and store it in whatever dtype weight and moments have."""
    program = tl.program_id(0).to(tl.int64)
    pairs = program * PAIRS + tl.arange(0, PAIRS)
    low = pairs.to(tl.uint32)
    high = (pairs >> 32).to(tl.uint32)
    bits = tl.philox(seed, low, high, low * 0, low * 0, ROUNDS)
    for half in tl.static_range(2):
        at = (2 * program + half) * PAIRS + tl.arange(0, PAIRS)
        exists = at < num_elements
        gradient = tl.load(gradient_ptr + at, mask=exists, other=0.0).to(tl.float32)
        average = tl.load(exp_avg_ptr + at, mask=exists, other=0.0).to(tl.float32)
        square = tl.load(exp_avg_sq_ptr + at, mask=exists, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + at, mask=exists, other=0.0).to(tl.float32)

        kept_weight, step_size, scale_correction, eps, part1, beta2, part2 = numbers
        average += part1 * (gradient - average)
        square = beta2 * square + part2 * gradient * gradient
        scale = tl.div_rn(tl.sqrt_rn(square), scale_correction) + eps
        weight = weight * kept_weight - step_size * tl.div_rn(average, scale)

        moments, other = bits[2 * half], bits[2 * half + 1]
        _store(exp_avg_ptr, at, exists, average, moments & 0xFFFF, True, INTERPRET)
        _store(exp_avg_sq_ptr, at, exists, square, moments >> 16, True, INTERPRET)
        noise = other & 0xFFFF
        _store(weight_ptr, at, exists, weight, noise, IS_WEIGHT_STOCHASTIC, INTERPRET)


@triton.jit
def _store(ptr, at, exists, value, noise, IS_STOCHASTIC: tl.constexpr, INTERPRET: tl.constexpr):
    """Store fp32 values, rounded at random in bfloat16 (`noise`: 16 bits) or to nearest."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if IS_STOCHASTIC and dtype == tl.bfloat16:
        # A carry out of the lower half moves the upper half, the bfloat16, one step from zero.
        rounded = (value.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
        stored = value.to(dtype)
    else:
        stored = round_to(value, dtype, INTERPRET)
    tl.store(ptr + at, stored, mask=exists)


def run_adamw(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: AdamWStep,
    *,
    seed: int,
    is_weight_stochastic: bool,
) -> None:
    """Make one step of AdamW, in place.

    Args:
        weight: contiguous, in any floating dtype, as the three that follow.
        gradient: of its shape, as are the moments.
        exp_avg: the first moment; bfloat16 is rounded at random, always.
        exp_avg_sq: the second.
        step: which step, and how large.
        seed: 64 bits, of the random bits: the same give the same.
        is_weight_stochastic: whether a bfloat16 weight is rounded at random, not to nearest.
    """
    num_elements = weight.numel()
    if num_elements == 0:
        return
    adamw_kernel[(triton.cdiv(num_elements, 2 * PAIRS),)](
        weight,
        gradient,
        exp_avg,
        exp_avg_sq,
        num_elements,
        seed,
        step.numbers(),
        PAIRS=PAIRS,
        ROUNDS=ROUNDS,
        IS_WEIGHT_STOCHASTIC=is_weight_stochastic,
        INTERPRET=is_interpreted(),
        enable_fp_fusion=True,
    )
