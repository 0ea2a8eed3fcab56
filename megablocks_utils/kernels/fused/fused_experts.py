"""The `triton` backend: experts in few fused kernels, which save only what no kernel can remake."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megablocks_utils.kernels.fused.combine import combine
from megablocks_utils.kernels.fused.gate_backward import Wanted, gate_backward
from megablocks_utils.kernels.fused.gate_up import gate_up
from megablocks_utils.kernels.fused.kernel_launch import (
    GateLayout,
    LoraRows,
    Routing,
    narrow,
)
from megablocks_utils.kernels.fused.layer_tiles import choose_layer_tiles, count_programs
from megablocks_utils.kernels.fused.matrices import Matrix
from megablocks_utils.kernels.fused.projection import Parameters, Projection
from megablocks_utils.kernels.fused.row_gemm import row_gemm
from megablocks_utils.kernels.fused.tile import TileTable
from megablocks_utils.kernels.fused.weight_grad import Operand
from megablocks_utils.kernels.gate import KnownActivation, KnownGate
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.weights import ExpertWeights, LowRank
from megablocks_utils.quantization.packed_experts import PackedExperts


def run_experts_triton(
    tokens: Tensor,
    order: ExpertOrder,
    top_k_weights: Tensor | None,
    experts: ExpertWeights,
    *,
    tiles: TileTable | None = None,
) -> Tensor:
    """Run the experts in fused kernels; see `ExpertBackend`. Nothing is read back to the host.

    Autograd keeps the tokens (where the first projection or its adapter is trained), the gate's
    inputs (N, 2 * I), without a gate the activation's (N, I), the routing and the parameters. What
    nothing needs is not computed. A backward pass through the backward pass raises.
    """
    tensors = [
        tokens.contiguous(),
        None if top_k_weights is None else top_k_weights.contiguous(),
        *_flatten(experts.gate_up_proj, experts.gate_up_bias, experts.gate_up_lora),
        *_flatten(experts.down_proj, experts.down_bias, experts.down_lora),
    ]
    # The backend refuses others.
    assert isinstance(experts.gate, KnownGate if experts.has_gate else KnownActivation), experts
    has_gradient = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    loras = experts.gate_up_lora, experts.down_lora
    offsets = torch.zeros(
        order.tokens_per_expert.numel() + 1, dtype=torch.int32, device=tokens.device
    )
    torch.cumsum(order.tokens_per_expert, 0, dtype=torch.int32, out=offsets[1:])
    tiles = tiles or choose_layer_tiles(tokens, order, experts)
    if isinstance(experts.gate_up_proj, PackedExperts):
        tiles = tiles.for_codes(tokens.element_size())
    plan = _Plan(
        num_rows=len(tokens) * order.top_k,
        top_k=order.top_k,
        tiles=tiles,
        num_programs=count_programs(tokens.device),
        layout=GateLayout(experts.gate, experts.is_interleaved),
        is_transposed=experts.is_transposed,
        scalings=tuple(lora.scaling if lora else 0.0 for lora in loras),
        keeps_gate_up_out=has_gradient and torch.is_grad_enabled(),
    )
    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        return _FusedExperts.apply(plan, order.order, offsets, *tensors)


@dataclass(frozen=True)
class _Plan:
    """What both passes need besides tensors."""

    num_rows: int
    top_k: int
    tiles: TileTable
    num_programs: int
    layout: GateLayout
    is_transposed: bool
    scalings: tuple[float, ...]
    keeps_gate_up_out: bool

    def projections(
        self, routing: Routing, parameters: Sequence[Tensor | None]
    ) -> tuple[Projection, Projection]:
        """Put the eight parameters, in the order of `_flatten`, into their projections."""
        first, second = (
            Projection(
                Parameters.of(part),
                scaling,
                self.is_transposed,
                routing,
                self.tiles,
                self.num_programs,
            )
            for part, scaling in zip((parameters[:4], parameters[4:]), self.scalings, strict=True)
        )
        return first, second


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        order: Tensor | None,
        offsets: Tensor,
        tokens: Tensor,
        top_k_weights: Tensor | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        routing = Routing(order, offsets, plan.num_rows, plan.top_k)
        first, second = plan.projections(routing, parameters)
        activations, gate_up_out = _run_first_half(tokens, first, plan)
        rows = row_gemm(
            activations,
            second.build_matrix(),
            routing,
            plan.tiles.linear,
            scatter=True,
            lora=second.lora_rows(Operand(activations)),
            bias=second.parameters.bias,
        )
        if plan.keeps_gate_up_out:
            needs = _Needs.of(ctx)
            kept_tokens = tokens if needs.multiplies_tokens else None
            ctx.plan = plan
            ctx.save_for_backward(
                order, offsets, kept_tokens, gate_up_out, top_k_weights, *parameters
            )
        return combine(rows, top_k_weights, plan.top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        order, offsets, tokens, gate_up_out, top_k_weights, *parameters = ctx.saved_tensors
        plan, needs, grad = ctx.plan, _Needs.of(ctx), grad.contiguous()
        routing = Routing(order, offsets, plan.num_rows, plan.top_k)
        first, second = plan.projections(routing, parameters)
        output_grads = Operand(grad, by_token=True)
        lora_grads = second.lora_grads(output_grads)
        through_gate = gate_backward(
            grad,
            second.build_matrix().transposed,
            gate_up_out,
            top_k_weights,
            routing,
            plan.tiles.act_backward,
            plan.layout,
            wanted=needs.of_gate,
            lora=lora_grads,
        )
        second_grads = second.gradients(
            output_grads,
            Operand.of(through_gate.weighted),
            lora_grads,
            _sort_weights(top_k_weights, grad, routing) if needs.second[1] else None,
            needs.second,
        )
        gate_up_grads = Operand.of(through_gate.gate_up_out)
        lora_grads = first.lora_grads(gate_up_grads) if needs.tokens or needs.first[2] else None
        first_grads = first.gradients(
            gate_up_grads,
            Operand.of(tokens, by_token=True),
            lora_grads,
            grad.new_ones(plan.num_rows, 1) if needs.first[1] else None,
            needs.first,
        )
        token_grads = weight_grads = None
        if needs.tokens:
            assert through_gate.gate_up_out is not None
            token_grads = _differentiate_tokens(through_gate.gate_up_out, first, lora_grads)
        if needs.top_k_weights:
            assert through_gate.top_k_weights is not None
            weight_grads = _add_bias_part(through_gate.top_k_weights, grad, second)
            weight_grads = weight_grads.view_as(top_k_weights).to(top_k_weights.dtype)
        return None, None, None, token_grads, weight_grads, *first_grads, *second_grads


class _Needs(NamedTuple):
    """Which inputs of `_FusedExperts` need a gradient; of a projection, those of `_flatten`."""

    tokens: bool
    top_k_weights: bool
    first: tuple[bool, ...]
    second: tuple[bool, ...]

    @classmethod
    def of(cls, ctx: Any) -> "_Needs":
        """Read them off autograd's context."""
        tokens, top_k_weights, *parameters = ctx.needs_input_grad[3:]
        return cls(tokens, top_k_weights, tuple(parameters[:4]), tuple(parameters[4:]))

    @property
    def of_gate(self) -> Wanted:
        """What is needed of the gate's backward pass; the second bias needs nothing of it."""
        weight, _, lora_a, lora_b = self.second
        gate_up_out = self.tokens or any(self.first)
        return Wanted(gate_up_out, weight or lora_a or lora_b, self.top_k_weights)

    @property
    def multiplies_tokens(self) -> bool:
        """Whether a gradient is made of the tokens: that of the first weight, of A or of B."""
        weight, _, lora_a, lora_b = self.first
        return weight or lora_a or lora_b


def _run_first_half(tokens: Tensor, first: Projection, plan: _Plan) -> tuple[Tensor, Tensor | None]:
    """Return the gate's results (N, I), and where they are kept its inputs, in expert order."""
    routing = first.routing
    lora, bias = first.lora_rows(Operand(tokens, by_token=True)), first.parameters.bias
    matrix = first.build_matrix()
    if plan.layout.has_halves:
        return gate_up(
            tokens,
            matrix,
            routing,
            plan.tiles.up,
            plan.layout,
            keeps_gate_up_out=plan.keeps_gate_up_out,
            lora=lora,
            bias=bias,
        )
    gate_up_out = None
    if plan.keeps_gate_up_out:
        gate_up_out = tokens.new_empty(routing.num_rows, matrix.num_cols)
    activations = row_gemm(
        tokens,
        matrix,
        routing,
        plan.tiles.linear,
        gather=True,
        lora=lora,
        bias=bias,
        layout=plan.layout,
        gate_up_out=gate_up_out,
    )
    return activations, gate_up_out


def _differentiate_tokens(
    gate_up_grads: Tensor, first: Projection, lora_grads: LoraRows | None
) -> Tensor:
    """Return the tokens' gradients (T, H): the first projection's backward pass."""
    rows = row_gemm(
        gate_up_grads,
        first.build_matrix().transposed,
        first.routing,
        first.tiles.linear,
        scatter=True,
        lora=lora_grads,
    )
    return combine(rows, None, first.routing.top_k)


def _add_bias_part(weight_grads: Tensor, grad: Tensor, second: Projection) -> Tensor:
    """Add the down projection's bias to the gradient (N,) of the routing weights."""
    bias = second.parameters.bias
    if bias is None:
        return weight_grads
    by_row = row_gemm(
        grad,
        Matrix(bias.unsqueeze(1), rows_are_last=True),
        second.routing,
        narrow(second.tiles.skinny, 1),
        gather=True,
        scatter=True,
    )
    return weight_grads + by_row.squeeze(1)


def _sort_weights(top_k_weights: Tensor | None, like: Tensor, routing: Routing) -> Tensor:
    """Return the routing weights (N, 1) in expert order, ones where there are none."""
    if top_k_weights is None:
        return like.new_ones(routing.num_rows, 1)
    flat = top_k_weights.reshape(-1, 1).to(like.dtype)
    return flat if routing.order is None else flat.index_select(0, routing.order)


def _flatten(weight: Tensor, bias: Tensor | None, lora: LowRank | None) -> list[Tensor | None]:
    """Return weight, bias, A and B of a projection."""
    return [weight, bias, *((lora.lora_a, lora.lora_b) if lora else (None, None))]
