"""Run experts one after the other with plain matrix products: any dtype, any size, any device."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from megablocks_utils.config import backends
from megablocks_utils.kernels.backends.backend import Backend
from megablocks_utils.kernels.permute import ExpertOrder, permute_tokens, unpermute_and_combine
from megablocks_utils.kernels.weights import ExpertWeights, LowRank


def run_experts_eager(
    tokens: Tensor, order: ExpertOrder, top_k_weights: Tensor | None, experts: ExpertWeights
) -> Tensor:
    """Loop over the experts; see `ExpertBackend`. Reads the counts back to the host.

    An expert without rows is computed on none, so that its weights get zero gradients and the graph
    is the same on every rank.
    """
    rows = permute_tokens(tokens, order)
    gate_up, down = experts.projections
    projections = zip(
        _split(gate_up, experts.gate_up_bias, experts.gate_up_lora),
        _split(down, experts.down_bias, experts.down_lora),
        strict=True,
    )
    results = []
    for expert_rows, (first, second) in zip(
        rows.split(order.tokens_per_expert.tolist()), projections, strict=True
    ):
        activations = experts.apply_gate(_project(expert_rows, *first))
        results.append(_project(activations, *second))
    return unpermute_and_combine(torch.cat(results), top_k_weights, order)


def _split(
    weights: Tensor, bias: Tensor | None, lora: LowRank | None
) -> list[tuple[Tensor, Tensor | None, LowRank | None]]:
    """Return each expert's weight (out, in), bias (out,) and adapter, (r, in) and (out, r)."""
    adapters: list[LowRank | None] = [None] * len(weights)
    if lora is not None:
        factors = zip(lora.lora_a.unbind(0), lora.lora_b.unbind(0), strict=True)
        adapters = [LowRank(a, b, lora.scaling) for a, b in factors]
    biases = [None] * len(weights) if bias is None else bias.unbind(0)
    return list(zip(weights.unbind(0), biases, adapters, strict=True))


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, lora: LowRank | None) -> Tensor:
    """Multiply one expert's rows (n, in) by its weight and adapter: (n, out)."""
    output = linear(rows, weight, bias)
    if lora is None:
        return output
    lora_rows = linear(rows, lora.lora_a)  # (n, r)
    return output + linear(lora_rows * lora.scaling, lora.lora_b)


EAGER = Backend(backends.EAGER, lambda _tiles: run_experts_eager)
