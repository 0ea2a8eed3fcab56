"""LoRA on the experts of a sharded model: adapters are sharded like their experts."""

import math

import torch
from torch import Tensor

from megablocks_utils.config.backends import list_backends
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.lora.settings import LoraSettings
from megablocks_utils.mesh.placement import (
    DimSplit,
    cut_slice,
    wrap_local_experts,
)
from megablocks_utils.moe.expert_lora import ExpertLora
from megablocks_utils.moe.sharded_moe import ShardedMoE


def attach_expert_lora(
    sharded: ShardedMoE, settings: LoraSettings, *, dtype: torch.dtype, seed: int
) -> None:
    """Give every expert adapters on the projections that the settings name, in place.

    They start as PEFT's do: A uniform within 1 / sqrt(in) (Kaiming's bound for a = sqrt(5)), B
    zero. The initial values of an expert's adapters are a function of the seed and the expert's
    place in the model alone, not of the mesh. No communication.

    Args:
        sharded: what `shard_moe` returned.
        settings: ranks and strength.
        dtype: of the adapters.
        seed: equal on all ranks.

    Raises:
        ConfigurationError: the experts run on a backend without adapters.
    """
    if sharded.kernel.name not in list_backends(with_adapters=True):
        raise ConfigurationError(
            f"the experts run on {sharded.kernel.name}, which has no adapters; shard_moe with "
            "kernel auto, triton, grouped_mm or eager makes experts that have them."
        )
    generator = torch.Generator().manual_seed(seed)
    for module in sharded.expert_modules.values():
        mine = list(module.local_experts())
        for projection in module.spec.projections:
            rank, weights = settings.expert_ranks[projection], getattr(module, projection)
            num_in, num_out = weights.shape[1:][:: 1 if module.spec.is_transposed else -1]
            bound = 1 / math.sqrt(num_in)
            lora_a = torch.empty(module.num_experts, rank, num_in).uniform_(
                -bound, bound, generator=generator
            )
            lora_b = torch.zeros(len(mine), num_out, rank)
            split_a, split_b = module.spec.find_lora_splits(projection)
            adapters = ExpertLora(
                _place(lora_a[mine], split_a, dtype, sharded),
                _place(lora_b, split_b, dtype, sharded),
                settings.scaling,
            )
            setattr(module, lora_name(projection), adapters)


def lora_name(projection: str) -> str:
    """Return the name that a projection's adapters have in the experts module."""
    return f"{projection}_lora"


def _place(
    factor: Tensor, split: DimSplit | None, dtype: torch.dtype, sharded: ShardedMoE
) -> Tensor:
    """Put factors of this rank's experts where their weights will be; memory of their own."""
    device = sharded.mesh.device_type  # the weights may still be on meta
    own = cut_slice(factor, sharded.mesh, split)
    own = own.to(device=device, dtype=dtype, copy=True).contiguous()
    return wrap_local_experts(own, sharded.mesh, split)
