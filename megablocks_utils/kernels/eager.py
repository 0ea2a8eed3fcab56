"""Run experts one after the other with plain matrix products: any dtype, any size, any device."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from megablocks_utils.kernels.low_rank import LowRank


def run_experts_eager(
    rows: Tensor,
    tokens_per_expert: list[int],
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: Callable[[Tensor], Tensor],
    *,
    gate_up_lora: LowRank | None = None,
    down_lora: LowRank | None = None,
) -> Tensor:
    """Loop over the experts; see `ExpertBackend`.

    An expert without rows is computed on none, so that its weights get zero gradients and the graph
    is the same on every rank.
    """
    projections = zip(_split(gate_up_proj, gate_up_lora), _split(down_proj, down_lora), strict=True)
    results = []
    for expert_rows, (gate_up, down) in zip(
        rows.split(tokens_per_expert), projections, strict=True
    ):
        gate, up = _project(expert_rows, *gate_up).chunk(2, dim=-1)
        results.append(_project(activation(gate) * up, *down))
    return torch.cat(results)


def _split(weights: Tensor, lora: LowRank | None) -> list[tuple[Tensor, LowRank | None]]:
    """Return the weight (out, in) and the adapter, (r, in) and (out, r), of each expert."""
    if lora is None:
        return [(weight, None) for weight in weights.unbind(0)]
    factors = zip(weights.unbind(0), lora.lora_a.unbind(0), lora.lora_b.unbind(0), strict=True)
    return [(weight, LowRank(a, b, lora.scaling)) for weight, a, b in factors]


def _project(rows: Tensor, weight: Tensor, lora: LowRank | None) -> Tensor:
    """Multiply one expert's rows (n, in) by its weight and adapter: (n, out)."""
    output = linear(rows, weight)
    if lora is None:
        return output
    inner = linear(rows, lora.lora_a)  # (n, r)
    return output + linear(inner * lora.scaling, lora.lora_b)
