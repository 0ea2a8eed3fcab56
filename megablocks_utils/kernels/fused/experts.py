"""The `triton` backend: experts in few fused kernels, which save only what no kernel can remake."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megablocks_utils.kernels.fused.combine import combine
from megablocks_utils.kernels.fused.gate_backward import gate_backward
from megablocks_utils.kernels.fused.gate_up import gate_up
from megablocks_utils.kernels.fused.launch import GateLayout, Matrix, Routing, build_routing
from megablocks_utils.kernels.fused.projection import Parameters, Projection
from megablocks_utils.kernels.fused.row_gemm import row_gemm
from megablocks_utils.kernels.fused.tiles import INTERPRET, TileTable
from megablocks_utils.kernels.fused.weight_grad import Operand
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.weights import ExpertWeights, LowRank


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
    inputs (N, 2 * I), the routing and the parameters. What nothing needs is not computed. A
    backward pass through the backward pass raises.
    """
    tensors = [
        tokens.contiguous(),
        None if top_k_weights is None else top_k_weights.contiguous(),
        *_flatten(experts.gate_up_proj, experts.gate_up_bias, experts.gate_up_lora),
        *_flatten(experts.down_proj, experts.down_bias, experts.down_lora),
    ]
    has_gradient = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    loras = experts.gate_up_lora, experts.down_lora
    plan = _Plan(
        routing=build_routing(order, len(tokens)),
        tiles=tiles or INTERPRET,
        num_programs=_count_programs(tokens.device),
        layout=GateLayout(experts.gate, experts.is_interleaved),
        is_transposed=experts.is_transposed,
        scalings=tuple(lora.scaling if lora else 0.0 for lora in loras),
        keeps_hidden=has_gradient and torch.is_grad_enabled(),
    )
    return _FusedExperts.apply(plan, *tensors)


@dataclass(frozen=True)
class _Plan:
    """What both passes need besides tensors that may have gradients."""

    routing: Routing
    tiles: TileTable
    num_programs: int
    layout: GateLayout
    is_transposed: bool
    scalings: tuple[float, ...]
    keeps_hidden: bool

    def projections(self, parameters: Sequence[Tensor | None]) -> tuple[Projection, Projection]:
        """Put the eight parameters, in the order of `_flatten`, into their projections."""
        first, second = (
            Projection(
                Parameters(*part),
                scaling,
                self.is_transposed,
                self.routing,
                self.tiles,
                self.num_programs,
            )
            for part, scaling in zip((parameters[:4], parameters[4:]), self.scalings, strict=True)
        )
        return first, second


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, tokens, top_k_weights, *parameters):
        first, second = plan.projections(parameters)
        routing, tiles = plan.routing, plan.tiles
        activations, hidden = gate_up(
            tokens,
            first.matrix,
            routing,
            tiles.up,
            plan.layout,
            keeps_hidden=plan.keeps_hidden,
            inner=first.inner(Operand(tokens, by_token=True)),
            bias=first.parameters.bias,
        )
        rows = row_gemm(
            activations,
            second.matrix,
            routing,
            tiles.linear,
            scatter=True,
            inner=second.inner(Operand(activations)),
            bias=second.parameters.bias,
        )
        if plan.keeps_hidden:
            # Indices are those of forward's arguments: weight 3, A 5 and B 6 of the first.
            wants_tokens = any(ctx.needs_input_grad[i] for i in (3, 5, 6))
            kept_tokens = tokens if wants_tokens else None
            ctx.plan = plan
            ctx.save_for_backward(kept_tokens, hidden, top_k_weights, *parameters)
        return combine(rows, top_k_weights, routing.top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tokens, hidden, top_k_weights, *parameters = ctx.saved_tensors
        plan, grad = ctx.plan, grad.contiguous()
        first, second = plan.projections(parameters)
        needs = ctx.needs_input_grad[1:]
        needs_tokens, needs_weights, needs_first, needs_second = (
            needs[0],
            needs[1],
            needs[2:6],
            needs[6:],
        )
        output_grads = Operand(grad, by_token=True)
        back = second.inner_back(output_grads)
        through_gate = gate_backward(
            grad,
            second.matrix.transposed,
            hidden,
            top_k_weights,
            plan.routing,
            plan.tiles.act_backward,
            plan.layout,
            wants_hidden=needs_tokens or any(needs_first),
            wants_weighted=needs_second[0] or any(needs_second[2:]),
            wants_top_k_weights=needs_weights,
            inner=back,
        )
        second_grads = second.gradients(
            output_grads,
            Operand(through_gate.weighted),
            back,
            _sort_weights(top_k_weights, grad, plan.routing) if needs_second[1] else None,
            needs_second,
        )
        hidden_grads = Operand(through_gate.hidden)
        needs_back = needs_tokens or needs_first[2]
        back = first.inner_back(hidden_grads) if needs_back else None
        first_grads = first.gradients(
            hidden_grads,
            Operand(tokens, by_token=True),
            back,
            grad.new_ones(plan.routing.num_rows, 1) if needs_first[1] else None,
            needs_first,
        )
        token_grads = None
        if needs_tokens:
            rows = row_gemm(
                through_gate.hidden,
                first.matrix.transposed,
                plan.routing,
                plan.tiles.linear,
                scatter=True,
                inner=back,
            )
            token_grads = combine(rows, None, plan.routing.top_k)
        weight_grads = None
        if needs_weights:
            weight_grads = _add_bias_part(through_gate.top_k_weights, grad, second)
            weight_grads = weight_grads.view_as(top_k_weights).to(top_k_weights.dtype)
        return None, token_grads, weight_grads, *first_grads, *second_grads


def _add_bias_part(weight_grads: Tensor, grad: Tensor, second: Projection) -> Tensor:
    """Add the down projection's bias to the gradient (N,) of the routing weights."""
    bias = second.parameters.bias
    if bias is None:
        return weight_grads
    by_row = row_gemm(
        grad,
        Matrix(bias.unsqueeze(1), rows_are_last=True),
        second.routing,
        second.tiles.skinny,
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


def _count_programs(device: torch.device) -> int:
    """Return how many programs keep the device busy; the interpreter gets a few, to test with."""
    if device.type != "cuda":
        return 8
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
