"""Run experts through the scattermoe package (Tan et al., arXiv 2403.08245), where it is installed.

Written against https://github.com/shawntan/scattermoe at the commit in `install`. Of the
package only `parallel_linear` is used: the gate is ours (its GLU takes up before gate), and so is
the order of the rows (its sort goes through torch.compile and is not stable).
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megablocks_utils.config import backends
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.backends.backend import Backend
from megablocks_utils.kernels.device import DeviceFacts
from megablocks_utils.kernels.fused.unpermute import fused_unpermute_and_combine
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.shapes import ExpertShapes, name_dtype
from megablocks_utils.kernels.weights import ExpertWeights

_MAX_ELEMENTS = 2**31 - 1


def run_experts_scattermoe(
    tokens: Tensor, order: ExpertOrder, top_k_weights: Tensor | None, experts: ExpertWeights
) -> Tensor:
    """Run both projections as the package's `parallel_linear`; see `ExpertBackend`.

    Biases, transposed and interleaved weights are fine; nothing is read back to the host. Where the
    second projection is trained, the package weights and sums each token's results itself, in the
    dtype of `tokens`, and its backward pass overwrites what it saved: a second one over the same
    graph is an error.

    Raises:
        ConfigurationError: the experts have adapters, or a tensor is too large for the package.
    """
    num_rows = len(tokens) * order.top_k
    _check_can_run(num_rows, experts)
    routing, is_sorted = _describe_order(order, num_rows), order.order is None
    gate_up, down = experts.projections
    gate_up_out = _project(
        tokens,
        gate_up,
        experts.gate_up_bias,
        routing,
        top_k=order.top_k,
        grouped_in=is_sorted,
        grouped_out=True,
    )
    activations = experts.apply_gate(gate_up_out)
    second = partial(_project, activations, down, experts.down_bias, routing, grouped_in=True)
    if top_k_weights is None:
        return second(grouped_out=is_sorted)
    if _is_trained(down, experts.down_bias):
        # A copy, because it is a view: FSDP2 warns of those, and adding to one in place raises.
        return second(gates=top_k_weights.to(tokens.dtype), grouped_out=False).clone()
    return fused_unpermute_and_combine(second(grouped_out=True), top_k_weights, order)


def _check_can_run(num_rows: int, experts: ExpertWeights) -> None:
    """Refuse what the package would compute wrongly without a word."""
    SCATTERMOE.refuse_unsupported(experts)
    gate_up = experts.projections[0]
    most = max(num_rows * max(gate_up.shape[1:]), gate_up.numel())
    if most > _MAX_ELEMENTS:
        raise ConfigurationError(
            "kernel is scattermoe, which counts in 32 bits, but a tensor of this layer has "
            f"{most} elements, more than {_MAX_ELEMENTS}; kernel triton counts in 64.",
            parameters=("kernel",),
        )


def _load_parallel_linear() -> Callable[..., Tensor]:
    """Import the package without what it does to others, and return its one function for us.

    Its `scattermoe.utils` replaces the forward of transformers' GPT-OSS and Granite experts when it
    is imported, by one for an older transformers; an empty module stands there meanwhile. Products
    in float32 are to be float32's: its default is TF32.
    """
    if "scattermoe" not in sys.modules:
        sys.modules["scattermoe.utils"] = ModuleType("scattermoe.utils")
        try:
            import_module("scattermoe")
        finally:
            del sys.modules["scattermoe.utils"]
    vars(import_module("scattermoe.kernels.ops"))["ALLOW_TF32"] = False
    return import_module("scattermoe.parallel_experts").parallel_linear


def _describe_order(order: ExpertOrder, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each sorted row's expert (N,), its routed row (N,) and each expert's end (L,).

    What the package's `flatten_sort_count` returns, in its order.
    """
    counts = order.tokens_per_expert
    experts = torch.arange(len(counts), device=counts.device)
    experts = experts.repeat_interleave(counts, output_size=num_rows)
    routed = torch.arange(num_rows, device=counts.device) if order.order is None else order.order
    return experts, routed, counts.cumsum(0)


def _is_trained(weights: Tensor, bias: Tensor | None) -> bool:
    return weights.requires_grad or (bias is not None and bias.requires_grad)


def _project(
    rows: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    routing: tuple[Tensor, Tensor, Tensor],
    *,
    top_k: int = 1,
    gates: Tensor | None = None,
    grouped_in: bool,
    grouped_out: bool,
) -> Tensor:
    """Multiply rows by their experts' weights (L, out, in); `grouped` says in expert order."""
    linear = _load_parallel_linear()
    weights = weights.transpose(1, 2)
    if not _is_trained(weights, bias):
        assert gates is None
        return _FrozenLinear.apply(
            rows, linear, weights, bias, routing, top_k, grouped_in, grouped_out
        )
    return linear(
        rows,
        weights,
        top_k,
        *routing,
        expert_biases=bias,
        gates=gates,
        grouped_in=grouped_in,
        grouped_out=grouped_out,
    )


class _FrozenLinear(torch.autograd.Function):
    """`parallel_linear` without a gradient of the weights, which its own backward always makes."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        linear: Callable[..., Tensor],
        weights: Tensor,
        bias: Tensor | None,
        routing: tuple[Tensor, Tensor, Tensor],
        top_k: int,
        grouped_in: bool,
        grouped_out: bool,
    ) -> Tensor:
        ctx.save_for_backward(weights, *routing)
        ctx.linear, ctx.top_k, ctx.sides = linear, top_k, (grouped_in, grouped_out)
        sides = {"grouped_in": grouped_in, "grouped_out": grouped_out}
        return linear(rows, weights, top_k, *routing, expert_biases=bias, **sides)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, *routing = ctx.saved_tensors
        grouped_in, grouped_out = ctx.sides
        sides = {"grouped_in": grouped_out, "grouped_out": grouped_in}
        grad = ctx.linear(grad, weights.transpose(1, 2), 1, *routing, **sides)
        if ctx.top_k > 1:
            grad = grad.unflatten(0, (-1, ctx.top_k)).sum(dim=1)
        return grad, *[None] * 7


def _find_limit(shapes: ExpertShapes, device: DeviceFacts) -> str | None:
    """Say why Triton's interpreter cannot run it: it is silently wrong in bfloat16 there."""
    if not device.is_interpreter or shapes.dtype == torch.float32:
        return None
    name = name_dtype(shapes.dtype)
    return f"scattermoe in Triton's interpreter computes in float32 only, not {name}"


SCATTERMOE = Backend(
    backends.SCATTERMOE,
    lambda _tiles: run_experts_scattermoe,
    packages=("scattermoe",),
    install="pip install 'scattermoe @ git+https://github.com/shawntan/scattermoe"
    "@47b5e1502e5a10e82c8e5945d761b877849871e7'",
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    on_cpu="interpreted",
    oldest_capability=(8, 0),
    find_limit=_find_limit,
)
