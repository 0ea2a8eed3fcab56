"""The device of this process, and that no other process has the same."""

from collections.abc import Sequence

import torch

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.processes.meeting import Arrival

__all__ = ["check_own_devices", "choose_device", "read_device_uuid"]


def choose_device(launch: LaunchEnvironment) -> torch.device:
    """Return this process's device, which becomes torch's current one; the CPU without a GPU.

    LOCAL_RANK counts the processes of a machine. Where each sees its own GPU alone (SLURM's
    `--gpus-per-task=1`), that one is number 0 in all of them.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def read_device_uuid(device: torch.device) -> str:
    """Return what tells a GPU from all others, whatever number it has here; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def check_own_devices(arrivals: Sequence[Arrival]) -> None:
    """Refuse two processes on one GPU, which NCCL would refuse later, or wait in without end.

    Raises:
        ConfigurationError: the same on every rank.
    """
    holders: dict[str, Arrival] = {}
    for arrival in arrivals:
        first = holders.setdefault(arrival.device_uuid or str(arrival.member), arrival)
        if first is not arrival:
            raise ConfigurationError(
                f"{first.member} and rank {arrival.member.rank} use the same GPU ("
                f"{arrival.device}, {arrival.device_uuid}), but every process needs one of its "
                "own; start at most as many processes on a machine as CUDA_VISIBLE_DEVICES shows "
                "GPUs."
            )
