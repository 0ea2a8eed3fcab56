"""Run experts one after the other with plain matrix products: any dtype, any size, any device."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear


def run_experts_eager(
    rows: Tensor,
    tokens_per_expert: list[int],
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Loop over the experts; see `ExpertBackend`.

    An expert without rows is computed on none, so that its weights get zero gradients and the graph
    is the same on every rank.
    """
    results = []
    per_expert = zip(
        rows.split(tokens_per_expert), gate_up_proj.unbind(0), down_proj.unbind(0), strict=True
    )
    for expert_rows, gate_up, down in per_expert:
        gate, up = linear(expert_rows, gate_up).chunk(2, dim=-1)
        results.append(linear(activation(gate) * up, down))
    return torch.cat(results)
