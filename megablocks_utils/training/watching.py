"""How the ranks of a run find each other, to notice when one is lost."""

from datetime import timedelta

import torch.distributed as dist

from megablocks_utils.liveness import describe_self
from megablocks_utils.monitor import start_monitor

__all__ = ["watch_ranks"]

_STORE_TIMEOUT = timedelta(seconds=30)


def watch_ranks(store: dist.Store, output_dir: str) -> None:
    """End this process when another rank is lost, as `monitor` says.

    **Collective:** all ranks of the default group must call it.

    Args:
        store: of this start of the run.
        output_dir: where to look for the newest checkpoint then.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    members = [describe_self(rank)] * world_size
    dist.all_gather_object(members, members[rank])
    own_client = store.clone()  # a wait of this rank holds the lock of the other
    own_client.set_timeout(_STORE_TIMEOUT)
    start_monitor(members, rank, dist.PrefixStore("liveness", own_client), output_dir)
