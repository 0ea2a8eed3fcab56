"""Run all local experts in two grouped matrix products of torch."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, pad, silu

from megablocks_utils.config import backends
from megablocks_utils.kernels.backends.backend import Backend
from megablocks_utils.kernels.device import DeviceFacts
from megablocks_utils.kernels.fused.unpermute import fused_unpermute_and_combine
from megablocks_utils.kernels.gate import SWIGLU
from megablocks_utils.kernels.permute import ExpertOrder, permute_tokens
from megablocks_utils.kernels.shapes import ExpertShapes, name_dtype
from megablocks_utils.kernels.weights import ExpertWeights, LowRank

_ALIGNMENT_BYTES = 16
_FAST_CAPABILITIES = (9, 10)  # the major ones that torch has a grouped kernel for, in bf16


def _find_limit(shapes: ExpertShapes, _device: DeviceFacts) -> str | None:
    """Say which size does not fit: rows of every operand must begin at multiples of 16 bytes."""
    multiple = _ALIGNMENT_BYTES // shapes.dtype.itemsize
    sizes = {"hidden_size": shapes.hidden_size, "intermediate_size": shapes.intermediate_size}
    for name, size in sizes.items():
        if size % multiple:
            return (
                f"grouped_mm needs {name} ({size}) to be a multiple of {multiple} in "
                f"{name_dtype(shapes.dtype)}"
            )
    return None


def _find_slowness(shapes: ExpertShapes, device: DeviceFacts) -> str | None:
    """Say where torch loops over the experts, and waits for the device in every product."""
    if device.capability is None or shapes.dtype == torch.float32:
        return None  # in fp32 the products themselves take long, in any kernel
    where = None
    if device.capability[0] not in _FAST_CAPABILITIES:
        where = f"on {device.name} (compute capability {'.'.join(map(str, device.capability))})"
    elif shapes.dtype != torch.bfloat16:
        where = f"in {name_dtype(shapes.dtype)}"
    return where and f"{where} torch's grouped_mm multiplies one expert after the other"


def run_experts_grouped_mm(
    tokens: Tensor, order: ExpertOrder, top_k_weights: Tensor | None, experts: ExpertWeights
) -> Tensor:
    """Multiply every expert's rows in one call per projection, three with an adapter.

    See `ExpertBackend`; nothing is read back to the host. The offsets end exactly at the last row:
    grouped_mm leaves rows past them uninitialised (pytorch#154557), so there must be none.
    """
    rows = permute_tokens(tokens, order)
    offsets = order.tokens_per_expert.cumsum(0, dtype=torch.int32)
    gate_up, down = experts.projections
    gate_up_out = _project(rows, gate_up, experts.gate_up_lora, offsets)
    activations = _apply_gate(_add_bias(gate_up_out, experts.gate_up_bias, order), experts)
    output = _project(activations, down, experts.down_lora, offsets)
    output = _add_bias(output, experts.down_bias, order)
    return fused_unpermute_and_combine(output, top_k_weights, order)


def _project(rows: Tensor, weights: Tensor, lora: LowRank | None, offsets: Tensor) -> Tensor:
    """Multiply rows (R, in) by their experts' weights and adapters: (R, out)."""
    if len(rows) == 0:
        # CUDA's kernel would be handed null pointers. The gradients are zeros all the same.
        return _project_nothing(rows, weights, lora)
    output = grouped_mm(rows, weights.transpose(1, 2), offs=offsets)
    if lora is None:
        return output
    lora_a, lora_b = _pad_rank(lora)
    lora_rows = grouped_mm(rows, lora_a.transpose(1, 2), offs=offsets)  # (R, r), perhaps padded
    # In place: the product with the weights keeps nothing of its own result for the backward pass.
    return output.add_(grouped_mm(lora_rows * lora.scaling, lora_b.transpose(1, 2), offs=offsets))


def _project_nothing(rows: Tensor, weights: Tensor, lora: LowRank | None) -> Tensor:
    """Multiply no rows (0, in) by one expert: (0, out)."""
    output = rows @ weights[0].T
    return output if lora is None else output + rows @ lora.lora_a[0].T @ lora.lora_b[0].T


def _apply_gate(gate_up: Tensor, experts: ExpertWeights) -> Tensor:
    if experts.gate == SWIGLU and not experts.is_interleaved:
        return _LeanSwiglu.apply(gate_up)
    return experts.apply_gate(gate_up)


class _LeanSwiglu(torch.autograd.Function):
    """`silu(gate) * up` that saves only its input (R, 2 * I): a third less than autograd would.

    The same operations in the same order, so the same results bit by bit.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        grad_gate, grad_up = both.chunk(2, dim=-1)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        torch.mul(grad, silu(gate), out=grad_up)
        return both


def _add_bias(rows: Tensor, bias: Tensor | None, order: ExpertOrder) -> Tensor:
    """Add each row's (R, out) expert's bias (L, out)."""
    if bias is None:
        return rows
    by_row = bias.repeat_interleave(order.tokens_per_expert, dim=0, output_size=len(rows))
    return rows.add_(by_row)


def _pad_rank(lora: LowRank) -> tuple[Tensor, Tensor]:
    """Return the factors with a rank whose rows begin at multiples of 16 bytes.

    The rank that is added is zero in both factors: it changes no result and no gradient.
    """
    lora_a, lora_b = lora.lora_a, lora.lora_b
    missing = -lora_a.shape[1] % (_ALIGNMENT_BYTES // lora_a.dtype.itemsize)
    if not missing:
        return lora_a, lora_b
    return pad(lora_a, (0, 0, 0, missing)), pad(lora_b, (0, missing))


# fp64 has no kernel.
GROUPED_MM = Backend(
    backends.GROUPED_MM,
    lambda _tiles: run_experts_grouped_mm,
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    oldest_capability=(8, 0),
    find_limit=_find_limit,
    find_slowness=_find_slowness,
    serves_transformers=True,
)
