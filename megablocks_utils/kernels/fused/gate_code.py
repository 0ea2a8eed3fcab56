"""The gate inside the kernels: its value, its derivatives, and its backward pass on a tile.

Which gate it is are three constants: ACTIVATION and CLAMP, by the names in `kernels.gate`, and
GATED, which is False for experts that have an activation alone. What a kernel does not need is not
in its code.
"""

import triton
import triton.language as tl

from megablocks_utils.kernels.fused.rounding import round_to

# gelu(x) is x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x^3)): tanh(y) = 2 * sigmoid(2 * y) - 1.
_GELU_LINEAR = tl.constexpr(1.5957691216057308)
_GELU_CUBIC = tl.constexpr(0.07135481282655572)


@triton.jit
def sigmoid_argument(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """Return the z of an activation x * sigmoid(z), and x times z's derivative by x."""
    if ACTIVATION == "gelu_tanh":
        cubic = _GELU_CUBIC * x * x
        z = x * (_GELU_LINEAR + cubic)
        x_slope = x * (_GELU_LINEAR + 3.0 * cubic)
    else:
        tl.static_assert(ACTIVATION == "silu")
        z = ALPHA * x
        x_slope = ALPHA * x
    return z, x_slope


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """Compute a `kernels.gate.Activation` in fp32; SiLU is x * sigmoid(ALPHA * x)."""
    if ACTIVATION == "relu_squared":
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        result = positive * positive
    else:
        z, _ = sigmoid_argument(x, ACTIVATION, ALPHA)
        result = x * tl.sigmoid(z)
    return result


@triton.jit
def differentiate_activation(x, factor, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """Return an activation, and `factor` times its derivative."""
    if ACTIVATION == "relu_squared":
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        result = positive * positive
        slope = factor * (2.0 * positive)
    else:
        z, x_slope = sigmoid_argument(x, ACTIVATION, ALPHA)
        sigmoid = tl.sigmoid(z)
        result = x * sigmoid
        slope = factor * sigmoid * (1.0 + x_slope * (1.0 - sigmoid))
    return result, slope


@triton.jit
def limit_above(x, LIMIT: tl.constexpr):
    """Cut values off at LIMIT; NaN stays, as torch's clamp has it."""
    return tl.minimum(x, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def limit_up(up, CLAMP: tl.constexpr, LIMIT: tl.constexpr):
    """Cut up off on both sides, and add the one that GPT-OSS adds."""
    up = limit_above(tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL), LIMIT)
    if CLAMP == "gpt_oss":
        up += 1.0
    return up


@triton.jit
def limit_inputs(gate, up, CLAMP: tl.constexpr, LIMIT: tl.constexpr):
    """Cut gate and up off as a gate does it before its activation."""
    if CLAMP == "before" or CLAMP == "gpt_oss":
        gate = limit_above(gate, LIMIT)
    if CLAMP != "none":
        up = limit_up(up, CLAMP, LIMIT)
    return gate, up


@triton.jit
def apply_gate(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Compute a `kernels.gate.KnownGate` in fp32."""
    gate, up = limit_inputs(gate, up, CLAMP, LIMIT)
    result = activate(gate, ACTIVATION, ALPHA)
    if CLAMP == "after":
        result = limit_above(result, LIMIT)
    return result * up


@triton.jit
def differentiate_gate(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Return the gate of gate and up in fp32, and its derivatives by gate and by up."""
    limited_gate, limited_up = limit_inputs(gate, up, CLAMP, LIMIT)
    by_up, by_gate = differentiate_activation(limited_gate, limited_up, ACTIVATION, ALPHA)
    # Beyond its limit a value is constant and has no gradient; at the limit it has, as in torch.
    if CLAMP == "before" or CLAMP == "gpt_oss":
        inside_gate = gate <= LIMIT
    if CLAMP == "after":
        inside_gate = by_up <= LIMIT
        by_up = limit_above(by_up, LIMIT)
    result = by_up * limited_up
    if CLAMP != "none":
        by_gate = tl.where(inside_gate, by_gate, 0.0)
        by_up = tl.where((up >= -LIMIT) & (up <= LIMIT), by_up, 0.0)
    return result, by_gate, by_up


@triton.jit
def halve(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cut a tile into its left and its right columns."""
    # Split takes the last dim apart: the halves must be its two places.
    halves = tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2))
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def split_pairs(tile, NUM_PAIRS: tl.constexpr):
    """Take columns gate, up, gate, up, ... apart; neighbours of a product lie in one thread."""
    return tl.split(tl.reshape(tile, (tile.shape[0], NUM_PAIRS, 2)))


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
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CLAMP: tl.constexpr,
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
    row_starts = rows.to(tl.int64)[:, None] * num_cols
    if GATED and INTERLEAVED:
        # Pairs are loaded as they lie, and taken apart in registers.
        pair_cols = 2 * first_col + tl.arange(0, 2 * BLOCK_N)
        pair_places = 2 * row_starts + pair_cols[None, :]
        pair_mask = exists[:, None] & (pair_cols < 2 * num_cols)[None, :]
        pairs = tl.load(gate_up_out_ptr + pair_places, mask=pair_mask, other=0.0)
        gate, up = split_pairs(pairs, BLOCK_N)
        gate, up = gate.to(tl.float32), up.to(tl.float32)
        result, by_gate, by_up = differentiate_gate(gate, up, ACTIVATION, CLAMP, ALPHA, LIMIT)
    elif GATED:
        gate_cols = cols[None, :]
        up_cols = (cols + num_cols)[None, :]
        gate = tl.load(gate_up_out_ptr + 2 * row_starts + gate_cols, mask=mask, other=0.0).to(
            tl.float32
        )
        up = tl.load(gate_up_out_ptr + 2 * row_starts + up_cols, mask=mask, other=0.0).to(
            tl.float32
        )
        result, by_gate, by_up = differentiate_gate(gate, up, ACTIVATION, CLAMP, ALPHA, LIMIT)
    else:
        up = tl.load(gate_up_out_ptr + row_starts + cols[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        result, by_up = differentiate_activation(up, 1.0, ACTIVATION, ALPHA)
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
        by_up = round_to(grad * by_up, dtype, INTERPRET)
        if GATED:
            by_gate = round_to(grad * by_gate, dtype, INTERPRET)
        if GATED and INTERLEAVED:
            pairs = tl.interleave(by_gate, by_up)
            tl.store(grad_gate_up_ptr + pair_places, pairs, mask=pair_mask)
        elif GATED:
            tl.store(grad_gate_up_ptr + 2 * row_starts + gate_cols, by_gate, mask=mask)
            tl.store(grad_gate_up_ptr + 2 * row_starts + up_cols, by_up, mask=mask)
        else:
            tl.store(grad_gate_up_ptr + row_starts + cols[None, :], by_up, mask=mask)
    return part
