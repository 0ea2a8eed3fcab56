"""The least time one MoE layer can take on a machine, and the work that counts as useful.

A layer runs in stages: forward, the gradient of its inputs, the gradient of its weights. Each stage
must do its multiplications and must read or write every operand once, so it takes at least the
longer of the two; the floor of a step is the sum over its stages. Assumed ideal: tokens are read
once although K experts want them, every expert has rows, gathers and activations hide behind the
matrix products. Not assumed away: the results of the experts (N, H) are written and read again, as
no kernel sums over experts while it multiplies.

Letters: T tokens, K experts a token, N = T * K rows, E experts, H hidden, F intermediate, r rank.
"""

from dataclasses import dataclass

from benchmarks.harness.case import LayerShape
from benchmarks.harness.device_timing import Machine
from benchmarks.moe_layer.cases import Mode

H100 = Machine(flops_per_s=798e12, bytes_per_s=3.0e12)
"""bf16 on one H100 SXM: the machine that the aims of the project are stated for."""


@dataclass(frozen=True)
class Work:
    """What a stage must do at least: floating point operations, and elements read or written."""

    flops: float
    elements: float

    def seconds(self, machine: Machine, itemsize: int) -> float:
        """Return the least time of the stage."""
        return max(self.flops / machine.flops_per_s, self.elements * itemsize / machine.bytes_per_s)


def forward_flops(shape: LayerShape, num_tokens: int) -> float:
    """Return 6 N H F: two products of 2 N H F for gate and up, one for down."""
    return 6.0 * num_tokens * shape.top_k * shape.hidden_size * shape.intermediate_size


def step_flops(shape: LayerShape, num_tokens: int, mode: Mode) -> float:
    """Return the useful work of forward and backward: 12 N H F, 18 with gradients of the weights.

    What is computed again is not useful work, and neither is a gradient that nobody asked for.
    """
    return forward_flops(shape, num_tokens) * (3 if mode.trains_weights else 2)


def adapter_flops(shape: LayerShape, num_tokens: int, mode: Mode) -> float:
    """Return what adapters add to a step: forward, gradients of inputs, gradients of factors.

    Gate and up share one A, as they do in adapters of the concatenated weight.
    """
    rows, hidden, inner = num_tokens * shape.top_k, shape.hidden_size, shape.intermediate_size
    forward = 2.0 * rows * mode.rank * ((hidden + 2 * inner) + (inner + hidden))
    return 3 * forward


def forward_floor_s(
    shape: LayerShape, num_tokens: int, machine: Machine, itemsize: int = 2
) -> float:
    """Return the least time of the forward pass; adapters are not counted."""
    return _forward(_Sizes(shape, num_tokens)).seconds(machine, itemsize)


def step_floor_s(
    shape: LayerShape, num_tokens: int, mode: Mode, machine: Machine, itemsize: int = 2
) -> float:
    """Return the least time of forward and backward in a mode."""
    sizes = _Sizes(shape, num_tokens)
    stages = [_forward(sizes), _inputs_gradient(sizes)]
    if mode.trains_weights:
        stages.append(_weights_gradient(sizes))
    if mode.rank:
        # The gradients of the factors read the rows of tokens, dh, a and the rows of the gradient.
        read = 2 * sizes.results + sizes.wide + sizes.narrow
        stages.append(Work(adapter_flops(shape, num_tokens, mode), read))
    return sum(stage.seconds(machine, itemsize) for stage in stages)


def least_saved_bytes(shape: LayerShape, num_tokens: int, itemsize: int = 2) -> int:
    """Return T H + 2 N F elements: the layer's tokens, and gate and up before the activation."""
    sizes = _Sizes(shape, num_tokens)
    return itemsize * (sizes.tokens + sizes.wide)


class _Sizes:
    """Elements of what the stages move, and the work of one of them."""

    def __init__(self, shape: LayerShape, num_tokens: int) -> None:
        rows = num_tokens * shape.top_k
        self.tokens = num_tokens * shape.hidden_size
        self.results = rows * shape.hidden_size
        self.narrow = rows * shape.intermediate_size
        self.wide = 2 * self.narrow
        self.down = shape.num_experts * shape.hidden_size * shape.intermediate_size
        self.gate_up = 2 * self.down
        self.flops = forward_flops(shape, num_tokens)


def _forward(sizes: _Sizes) -> Work:
    first = sizes.tokens + sizes.gate_up + sizes.wide + sizes.narrow
    second = sizes.narrow + sizes.down + sizes.results
    combine = sizes.results + sizes.tokens
    return Work(sizes.flops, first + second + combine)


def _inputs_gradient(sizes: _Sizes) -> Work:
    """Read the gradient, gate and up; write dh and the weighted a; then rows, then tokens."""
    first = sizes.tokens + sizes.down + 2 * sizes.wide
    second = sizes.wide + sizes.gate_up + sizes.results
    combine = sizes.results + sizes.tokens
    return Work(sizes.flops, first + second + combine)


def _weights_gradient(sizes: _Sizes) -> Work:
    """Write the weighted a; read it and the gradient, write down's; read tokens and dh."""
    down = sizes.narrow + sizes.tokens + sizes.narrow + sizes.down
    gate_up = sizes.tokens + sizes.wide + sizes.gate_up
    return Work(sizes.flops, down + gate_up)
