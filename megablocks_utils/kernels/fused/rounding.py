"""Rounding as the device does it, in the interpreter too."""

import triton
import triton.language as tl


@triton.jit
def round_to(value, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Round fp32 to nearest even in `dtype`, which the interpreter would cut off for bf16."""
    if INTERPRET and dtype == tl.bfloat16:
        # Half a unit of the last place that stays, and one more bit on ties of an odd number.
        bits = value.to(tl.uint32, bitcast=True)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)
