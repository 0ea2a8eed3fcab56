"""Model FLOPs utilization: how much of the devices' dense peak the model's own operations take."""

import torch

from megablocks_utils.planning.model.gpus import find_peak_flops
from megablocks_utils.training.report.parameters import ParameterCounts

__all__ = ["mfu_per_token_rate"]


def mfu_per_token_rate(
    counts: ParameterCounts, device: torch.device, world_size: int
) -> float | None:
    """Return the utilization of a run that takes one input token a second, all ranks together.

    Args:
        counts: of the model.
        device: of this rank; all are taken to be of its kind.
        world_size: ranks, a device each.

    Returns:
        None on a CPU, on a GPU whose peak is not known, and for a model whose active parameters
        are not.
    """
    if device.type != "cuda" or counts.flops_per_token is None:
        return None
    peak = find_peak_flops(torch.cuda.get_device_name(device))
    return None if peak is None else counts.flops_per_token / (peak * world_size)
