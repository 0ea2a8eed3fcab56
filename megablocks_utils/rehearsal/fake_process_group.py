"""Be one rank of a run whose other ranks do not exist."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from megablocks_utils.processes import agreement

__all__ = ["fake_process_group"]


@contextmanager
def fake_process_group(world_size: int, device_type: str, rank: int = 0) -> Iterator[None]:
    """Initialise torch's fake process group: every collective returns at once, with anything.

    Where ranks agree on objects, the others think as this one does.
    Accelerate reads the launcher's variables, so they are set too, for this process.
    """
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # read, but never opened
        "ACCELERATE_USE_CPU": str(device_type == "cpu"),
        "FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE",  # as accelerate.yaml has it
    }
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    is_alone = agreement._is_alone
    agreement._is_alone = lambda group: True
    try:
        yield
    finally:
        agreement._is_alone = is_alone
        dist.destroy_process_group()
        # Both remember meshes: another rank's are equal to them, but their groups are others.
        _clear_sharding_prop_cache()
        AcceleratorState._reset_state(reset_partial_state=True)
