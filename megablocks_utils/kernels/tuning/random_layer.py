"""A layer of random experts of a given size, and rows for it: to time backends on."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megablocks_utils.kernels.backends.backend import ExpertBackend
from megablocks_utils.kernels.permute import ExpertOrder, sort_by_expert
from megablocks_utils.kernels.shapes import ExpertShapes
from megablocks_utils.kernels.weights import ExpertWeights, LowRank
from megablocks_utils.quantization.packing import pack_all

__all__ = ["RandomLayer", "build_random_layer"]


@dataclass(frozen=True)
class RandomLayer:
    """Inputs of a backend, and what is differentiated.

    Attributes:
        tokens: (T, H).
        order: which of the T * K rows goes to which expert.
        top_k_weights: (T, K); None with K = 1, as for rows that came from other ranks.
        experts: the layer.
        leaves: what gets a gradient in the layer's mode.
        upstream: (T, H), gradient of the result.
    """

    tokens: Tensor
    order: ExpertOrder
    top_k_weights: Tensor | None
    experts: ExpertWeights
    leaves: tuple[Tensor, ...]
    upstream: Tensor

    def step(self, backend: ExpertBackend) -> list[Tensor]:
        """Run forward and backward; return the result and the gradients of `leaves`."""
        output = backend(self.tokens, self.order, self.top_k_weights, self.experts)
        return [output, *torch.autograd.grad(output, self.leaves, self.upstream)]


def build_random_layer(
    shapes: ExpertShapes, *, lora_r: int, device: torch.device | str, seed: int = 0
) -> RandomLayer:
    """Draw a layer whose rows go to all experts alike.

    Args:
        shapes: sizes, dtype, mode, and how many rows.
        lora_r: rank of adapters, where the mode has them.
        device: where it lies.
        seed: of everything.
    """
    generator = torch.Generator(device).manual_seed(seed)
    num_experts, top_k, num_rows = shapes.counts
    num_tokens = num_rows // top_k

    def draw(*size: int, scale: float = 1.0, is_trained: bool = True) -> Tensor:
        values = torch.randn(size, generator=generator, device=device, dtype=shapes.dtype)
        return values.mul_(scale).requires_grad_(is_trained)

    experts = _draw_experts(shapes, lora_r, draw)
    chances = torch.rand(num_tokens, num_experts, generator=generator, device=device)
    chosen, top_k_index = chances.topk(top_k)
    top_k_weights = chosen.to(shapes.dtype).requires_grad_() if top_k > 1 else None
    tokens = draw(num_tokens, shapes.hidden_size)
    inputs = [tokens] if top_k_weights is None else [tokens, top_k_weights]
    trained = [tensor for tensor in experts.tensors.values() if tensor.requires_grad]
    return RandomLayer(
        tokens,
        sort_by_expert(top_k_index, num_experts),
        top_k_weights,
        experts,
        leaves=(*inputs, *trained),
        upstream=draw(num_tokens, shapes.hidden_size, is_trained=False),
    )


def _draw_experts(shapes: ExpertShapes, lora_r: int, draw: Callable[..., Tensor]) -> ExpertWeights:
    """Draw what the experts have, as it is stored."""
    num_experts, is_trained = shapes.num_local_experts, shapes.mode == "full"
    hidden, intermediate = shapes.hidden_size, shapes.intermediate_size

    def draw_lora(num_in: int, num_out: int) -> LowRank | None:
        if not shapes.has_adapters:
            return None
        lora_a = draw(num_experts, lora_r, num_in, scale=1 / math.sqrt(num_in))
        lora_b = draw(num_experts, num_out, lora_r, scale=1 / math.sqrt(lora_r))
        return LowRank(lora_a, lora_b, scaling=1.0)

    def draw_weights(num_out: int, num_in: int) -> Tensor:
        sides = (num_in, num_out) if shapes.is_transposed else (num_out, num_in)
        return draw(num_experts, *sides, scale=1 / math.sqrt(num_in), is_trained=is_trained)

    def draw_bias(num_out: int) -> Tensor | None:
        return draw(num_experts, num_out, is_trained=is_trained) if shapes.has_bias else None

    def pack(weights: Tensor) -> Tensor:
        if shapes.weight_format is None:
            return weights
        return pack_all(shapes.weight_format, weights, is_transposed=shapes.is_transposed)

    outputs = 2 * intermediate if shapes.has_gate else intermediate
    return ExpertWeights(
        pack(draw_weights(outputs, hidden)),
        pack(draw_weights(hidden, intermediate)),
        shapes.gate,
        gate_up_lora=draw_lora(hidden, outputs),
        down_lora=draw_lora(intermediate, hidden),
        gate_up_bias=draw_bias(outputs),
        down_bias=draw_bias(hidden),
        is_transposed=shapes.is_transposed,
        is_interleaved=shapes.is_interleaved,
        has_gate=shapes.has_gate,
    )
