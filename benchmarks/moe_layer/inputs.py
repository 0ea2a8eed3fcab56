"""Weights, adapters, tokens and routing of a case, the same for every contender and process."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.moe_layer.cases import Case

PROJECTIONS = ("gate_up_proj", "down_proj")
ADAPTERS = tuple(f"{name}.lora_{side}" for name in PROJECTIONS for side in "AB")
SCALING = 2.0
_B_STD = 0.05
_WEIGHTS_SEED, _INPUTS_SEED = 0, 1


@dataclass(frozen=True)
class LayerWeights:
    """The experts of a layer; plain tensors without gradients, which nobody may write to.

    Attributes:
        gate_up_proj: (E, 2 * F, H), gate rows first.
        down_proj: (E, H, F).
        adapters: `ADAPTERS` -> (E, r, in) or (E, out, r), B not zero; empty without.
        scaling: factor of the adapters.
    """

    gate_up_proj: Tensor
    down_proj: Tensor
    adapters: dict[str, Tensor]
    scaling: float = SCALING

    def named(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        return {name: getattr(self, name) for name in PROJECTIONS} | self.adapters


@dataclass(frozen=True)
class LayerInputs:
    """What a layer is called with, and the gradient of its output.

    Attributes:
        tokens: (T, H), a leaf.
        top_k_index: (T, K).
        top_k_weights: (T, K), a leaf.
        upstream: (T, H).
    """

    tokens: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    upstream: Tensor

    @property
    def device(self) -> torch.device:
        """Where the layer runs."""
        return self.tokens.device

    def leaves(self) -> dict[str, Tensor]:
        """Return what has a gradient."""
        return {"tokens": self.tokens, "top_k_weights": self.top_k_weights}


def draw_weights(case: Case, device: torch.device) -> LayerWeights:
    """Draw experts whose results are as large as their tokens, and adapters in `lora` modes."""
    generator = torch.Generator(device).manual_seed(_WEIGHTS_SEED)
    shape, rank, dtype = case.shape, case.mode.rank, getattr(torch, case.dtype)

    def draw(*size: int, std: float) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(std)

    sizes = {
        "gate_up_proj": (2 * shape.intermediate_size, shape.hidden_size),
        "down_proj": (shape.hidden_size, shape.intermediate_size),
    }
    weights: dict[str, Tensor] = {}
    adapters: dict[str, Tensor] = {}
    for name, (num_out, num_in) in sizes.items():
        std = 1 / math.sqrt(num_in)
        weights[name] = draw(shape.num_experts, num_out, num_in, std=std)
        if rank:
            adapters[f"{name}.lora_A"] = draw(shape.num_experts, rank, num_in, std=std)
            adapters[f"{name}.lora_B"] = draw(shape.num_experts, num_out, rank, std=_B_STD)
    return LayerWeights(weights["gate_up_proj"], weights["down_proj"], adapters)


def draw_inputs(case: Case, device: torch.device) -> LayerInputs:
    """Draw tokens, a routing of the case's kind, routing weights that sum to 1 and a gradient.

    Routing weights have the dtype of the tokens, as Qwen3's router returns them (Mixtral's are
    fp32, which makes transformers' own experts larger and slower).
    """
    generator = torch.Generator(device).manual_seed(_INPUTS_SEED)
    size, dtype = (case.num_tokens, case.shape.hidden_size), getattr(torch, case.dtype)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    index = route(case, generator)
    weights = draw(*index.shape).softmax(-1)
    return LayerInputs(
        tokens=draw(*size).to(dtype).requires_grad_(),
        top_k_index=index,
        top_k_weights=weights.to(dtype).requires_grad_(),
        upstream=draw(*size).to(dtype),
    )


def route(case: Case, generator: torch.Generator) -> Tensor:
    """Return each token's experts (T, K).

    `uniform`: K different ones, all equally likely; `zipf`: K different ones, the n-th expert drawn
    with a weight of 1 / n; `all-to-one`: expert 0 for every slot, the worst case for a kernel that
    assigns experts to processors (no router does it, but its first slot may).
    """
    shape = case.shape
    if case.routing == "all-to-one":
        size = (case.num_tokens, shape.top_k)
        return torch.zeros(size, dtype=torch.int64, device=generator.device)
    # The largest of Gumbel noise plus log weights are a draw by weight without replacement.
    uniform = torch.rand(
        case.num_tokens, shape.num_experts, generator=generator, device=generator.device
    )
    scores = -(-uniform.clamp_(1e-20, 1 - 1e-7).log()).log()
    if case.routing == "zipf":
        scores -= torch.arange(1, shape.num_experts + 1, device=generator.device).log()
    return scores.topk(shape.top_k).indices
