"""The tiles of a layer, and how many programs its device runs, from the tensors at hand."""

import torch
from torch import Tensor

from megablocks_utils.kernels.fused.tile import TileTable
from megablocks_utils.kernels.fused.tiles import choose_tiles, name_architecture
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.weights import ExpertWeights

__all__ = ["choose_layer_tiles", "count_processors", "count_programs"]


def choose_layer_tiles(tokens: Tensor, order: ExpertOrder, experts: ExpertWeights) -> TileTable:
    """Return the table's tiles for these rows on this device."""
    sizes = experts.down_proj.shape[1:]
    hidden_size, intermediate_size = reversed(sizes) if experts.is_transposed else sizes
    loras = [lora for lora in (experts.gate_up_lora, experts.down_lora) if lora is not None]
    capability = torch.cuda.get_device_capability(tokens.device) if tokens.is_cuda else None
    return choose_tiles(
        arch=name_architecture(capability),
        itemsize=tokens.element_size(),
        rows=len(tokens) * order.top_k,
        num_experts=len(experts.gate_up_proj),
        num_cols={
            "up": intermediate_size,
            "linear": hidden_size,
            "skinny": max((lora.lora_a.shape[1] for lora in loras), default=1),
            "act_backward": intermediate_size,
        },
        num_processors=count_processors(tokens.device),
    )


def count_processors(device: torch.device) -> int:
    """Return how many programs run at once, one on each; the interpreter has one process."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def count_programs(device: torch.device) -> int:
    """Return how many programs keep the device busy; the interpreter gets a few, to test with."""
    return 2 * count_processors(device) if device.type == "cuda" else 8
