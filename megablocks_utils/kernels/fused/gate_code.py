"""The gate inside the kernels: its value, its derivatives, and its backward pass on a tile."""

import triton
import triton.language as tl

from megablocks_utils.kernels.fused.device_code import round_to


@triton.jit
def clamp(gate, up, LIMIT: tl.constexpr):
    """Cut gate and up off where GPT-OSS does, and add the one that it adds to up."""
    return tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0


@triton.jit
def apply_gate(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Compute `kernels.gate.KnownGate` in fp32; a LIMIT of 0 is none."""
    if LIMIT > 0:
        gate, up = clamp(gate, up, LIMIT)
    return gate * tl.sigmoid(ALPHA * gate) * up


@triton.jit
def differentiate_gate(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Return the gate of gate and up in fp32, and its derivatives by gate and by up."""
    # Beyond the limit a value is constant and has no gradient; without one, NaN alone is outside.
    inside_gate = gate == gate
    inside_up = inside_gate
    if LIMIT > 0:
        inside_gate = gate <= LIMIT
        inside_up = (up >= -LIMIT) & (up <= LIMIT)
        gate, up = clamp(gate, up, LIMIT)
    # by_gate is the derivative of gate * sigmoid(ALPHA * gate), times up.
    sigmoid = tl.sigmoid(ALPHA * gate)
    by_up = gate * sigmoid
    by_gate = up * sigmoid * (1.0 + ALPHA * gate * (1.0 - sigmoid))
    return by_up * up, tl.where(inside_gate, by_gate, 0.0), tl.where(inside_up, by_up, 0.0)


@triton.jit
def halve(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cut a tile into its left and its right columns."""
    # Split takes the last dim apart: the halves must be its two places.
    halves = tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2))
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def backward_through_gate(
    grad,
    first_col,
    rows,
    routed,
    exists,
    num_cols,
    gate_up_out_ptr,
    weight_ptr,
    grad_gate_up_ptr,
    weighted_ptr,
    BLOCK_N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    KEEP_GRAD_GATE_UP: tl.constexpr,
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
    gate = tl.load(gate_up_out_ptr + 2 * row_starts + gate_cols, mask=mask, other=0.0).to(
        tl.float32
    )
    up = tl.load(gate_up_out_ptr + 2 * row_starts + up_cols, mask=mask, other=0.0).to(tl.float32)
    result, by_gate, by_up = differentiate_gate(gate, up, ALPHA, LIMIT)
    # Before `grad` and `result` are weighted: the routing weight's gradient is their product.
    part = tl.sum(tl.where(mask, grad * result, 0.0), 1)
    if HAS_WEIGHTS:
        weight = tl.load(weight_ptr + routed, mask=exists, other=0.0).to(tl.float32)[:, None]
        grad *= weight
        result *= weight
    # What the down projection's weight gradient multiplies: made again here, not kept from forward.
    if KEEP_WEIGHTED:
        result = round_to(result, dtype, INTERPRET)
        tl.store(weighted_ptr + row_starts + cols[None, :], result, mask=mask)
    if KEEP_GRAD_GATE_UP:
        by_gate = round_to(grad * by_gate, dtype, INTERPRET)
        by_up = round_to(grad * by_up, dtype, INTERPRET)
        tl.store(grad_gate_up_ptr + 2 * row_starts + gate_cols, by_gate, mask=mask)
        tl.store(grad_gate_up_ptr + 2 * row_starts + up_cols, by_up, mask=mask)
    return part
