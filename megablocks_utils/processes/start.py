"""Connect the processes of a run, and have them watch each other."""

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megablocks_utils.processes.agreement import gather_from_all_ranks
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.processes.liveness import describe_self
from megablocks_utils.processes.monitor import start_monitor

__all__ = ["start_processes"]

_STORE_TIMEOUT = timedelta(seconds=30)


def start_processes(launch: LaunchEnvironment, output_dir: str | None = None) -> torch.device:
    """Connect the processes of the run and return this rank's device.

    **Collective:** waits for all ranks. A run of one process makes a group of one, so that there is
    one code path.

    Args:
        launch: which process this is.
        output_dir: where to look for checkpoints when a rank is lost; None: ranks are not watched.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Gathering experts that are sharded twice takes two all-gathers: nothing to warn of.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if dist.is_initialized():
        return device
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return device
    store, rank, world_size = next(dist.rendezvous("env://"))
    # With static rendezvous (no --rdzv_backend) torchrun 2.13 restarts processes on the same store,
    # where those of the attempt before have left their addresses.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    if output_dir is not None:
        _watch_ranks(store, rank, output_dir)
    return device


def _watch_ranks(store: dist.PrefixStore, rank: int, output_dir: str) -> None:
    members = gather_from_all_ranks(lambda: describe_self(rank))
    # The launcher's store may hold what an earlier start of this run has written.
    prefix = f"liveness/{members[0].pid}-{members[0].started}"
    own_client = store.clone()  # type: ignore[attr-defined]  # missing from torch's stubs
    own_client.set_timeout(_STORE_TIMEOUT)
    start_monitor(members, rank, dist.PrefixStore(prefix, own_client), output_dir)
