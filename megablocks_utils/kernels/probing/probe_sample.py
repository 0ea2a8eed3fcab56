"""What a probe sends through a backend: a few of the user's experts, and random tokens for them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megablocks_utils.kernels.gate import Clamp, KnownGate
from megablocks_utils.kernels.permute import ExpertOrder, sort_by_expert
from megablocks_utils.kernels.weights import ExpertWeights, LowRank

__all__ = ["Sample", "as_leaf", "draw_samples", "take_experts"]

NUM_TOKENS = 32
MAX_EXPERTS = 2
"""Two, so that one could be taken for the other; no more, so that large experts fit beside all."""


@dataclass(frozen=True)
class Sample:
    """Tokens, how they are routed, and the gradient of their results."""

    tokens: Tensor
    order: ExpertOrder
    top_k_weights: Tensor | None
    upstream: Tensor

    def to(self, dtype: torch.dtype) -> "Sample":
        """Return the same numbers in a more precise dtype."""
        weights = None if self.top_k_weights is None else self.top_k_weights.to(dtype)
        return replace(
            self,
            tokens=self.tokens.to(dtype),
            top_k_weights=weights,
            upstream=self.upstream.to(dtype),
        )


def take_experts(
    experts: ExpertWeights, dtype: torch.dtype, generator: torch.Generator
) -> ExpertWeights:
    """Return the first experts as leaves of their own, with random adapters."""
    taken = experts.map_tensors(lambda tensor: as_leaf(tensor[:MAX_EXPERTS], dtype))
    gate_up, down = taken.projections
    return replace(
        taken,
        gate_up_lora=taken.gate_up_lora and _draw_adapter(taken.gate_up_lora, gate_up, generator),
        down_lora=taken.down_lora and _draw_adapter(taken.down_lora, down, generator),
    )


def as_leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor cut off from its graph; a view of it unless it has another dtype."""
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)


def _draw_adapter(lora: LowRank, weights: Tensor, generator: torch.Generator) -> LowRank:
    """Return a random adapter that adds about as much as the weights (L, out, in) give."""
    rank, num_in = lora.lora_a.shape[1:]
    size = torch.linalg.vector_norm(weights.detach(), dtype=torch.float32).item()
    size = size / math.sqrt(weights.numel()) or 1.0
    scales = num_in**-0.5, size * math.sqrt(num_in / rank) / lora.scaling

    def draw(like: Tensor, scale: float) -> Tensor:
        return _draw(like.shape, like, generator, scale).requires_grad_(like.requires_grad)

    return replace(lora, lora_a=draw(lora.lora_a, scales[0]), lora_b=draw(lora.lora_b, scales[1]))


def _draw(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """Draw on the CPU, so that the numbers are the same for every device."""
    return (torch.randn(shape, generator=generator) * scale).to(like)


def draw_samples(
    experts: ExpertWeights, generator: torch.Generator, *, is_weighted: bool
) -> Iterator[Sample]:
    """Yield tokens spread over the experts, then the same tokens all on the last one.

    With a clamped gate the second time so large that a good share of the values is beyond the
    limit, which few of a model's own are.
    """
    num_experts, like = experts.down_proj.shape[0], experts.down_proj
    hidden_size = experts.projections[1].shape[1]
    tokens, upstream = (_draw((NUM_TOKENS, hidden_size), like, generator) for _ in range(2))
    spread = _draw_routing(num_experts, num_experts if is_weighted else 1, generator)
    weights = None
    if is_weighted:
        weights = torch.rand(spread.shape, generator=generator).to(like.device) + 0.1
    scale = _scale_beyond_limit(experts)
    samples = [(spread, tokens)]
    if num_experts > 1 or scale != 1:
        samples.append((torch.full_like(spread, num_experts - 1), tokens * scale))
    for index, tokens in samples:
        order = sort_by_expert(index.to(like.device), num_experts)
        if not is_weighted and num_experts == 1:
            order = replace(order, order=None, inverse=None)  # rows arrive sorted
        yield Sample(tokens, order, weights, upstream)


def _scale_beyond_limit(experts: ExpertWeights) -> float:
    """Return a factor of random tokens that makes a gate's inputs about as large as its limit."""
    gate, weights = experts.gate, experts.projections[0]
    if not isinstance(gate, KnownGate) or gate.clamp is Clamp.NONE:
        return 1.0
    size = torch.linalg.vector_norm(weights.detach(), dtype=torch.float32).item()
    return gate.limit / (size / math.sqrt(weights.numel() / weights.shape[2]) or 1.0)


def _draw_routing(num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Return (T, K) experts, three sevenths of the rows on the first of two.

    27 of 64 or 13 of 32: no count is a multiple of a kernel's tile, which would leave its masks
    untried. So some tokens have the same expert twice.
    """
    rows = torch.randperm(NUM_TOKENS * top_k, generator=generator)
    on_first = len(rows) * 3 // 7 if num_experts > 1 else len(rows)
    return (rows >= on_first).long().view(NUM_TOKENS, top_k)
