"""Give a plain model the experts that a packed one computes with."""

from collections.abc import Collection

import torch
from torch import nn

from megablocks_utils.moe.expert_spec import find_expert_modules, read_expert_specs
from megablocks_utils.quantization.format_table import FORMATS, round_to_format

__all__ = ["round_experts"]


@torch.no_grad()
def round_experts(
    model: nn.Module, weight_format: str, kept: Collection[str] = frozenset()
) -> None:
    """Replace the projections of transformers' experts by what a format keeps of them, in place.

    Args:
        model: with its weights, as they are stored.
        weight_format: of `FORMATS`.
        kept: names of projections that were in this format before, and are left as they are.
    """
    modules = find_expert_modules(model)
    for name, spec in read_expert_specs(modules).items():
        for projection in spec.projections:
            if f"{name}.{projection}" in kept:
                continue
            for matrix in modules[name].get_parameter(projection)[: spec.num_experts]:
                stored = matrix.T if spec.is_transposed else matrix
                stored.copy_(round_to_format(stored.contiguous(), FORMATS[weight_format]))
