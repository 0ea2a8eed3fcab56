"""Make Accelerate use FSDP where its allow-list leaves it off: on CPUs and with one process.

Upstream cause: `AcceleratorState.__init__` (accelerate 1.15, state.py, "elif self.distributed_type
in [MULTI_GPU, ...]") turns FSDP on for a list of device types that has no CPU in it, and silently
trains plain data parallel otherwise. Both scripts use this module, so that what a CPU runs is what
a GPU runs.
"""

import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh

_LEFT_OFF = (DistributedType.MULTI_CPU, DistributedType.NO)


def turn_fsdp_on(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Give an accelerator its FSDP plugin where Accelerate itself did not.

    Call it right after the accelerator was made, before anything is prepared. Does nothing where
    FSDP is on already, so it has no effect once Accelerate fixes its list.
    """
    state = accelerator.state
    if state.distributed_type not in _LEFT_OFF:
        return
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
    # A later AcceleratorState() copies the type from here; without it clip_grad_norm_ goes local.
    partial = PartialState()
    partial.distributed_type = DistributedType.FSDP
    if partial.device.type == "cpu":
        # Accelerate says cpu:0, which FSDP1 treats as another device than cpu.
        partial.device = state.device = torch.device("cpu")


def assert_fsdp_is_on(accelerator: Accelerator) -> None:
    """Stop rather than train with plain data parallelism.

    Raises:
        RuntimeError: Accelerate does not run FSDP.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        raise RuntimeError(
            f"Accelerate runs {accelerator.distributed_type.value} instead of FSDP: experts and "
            "the rest of the model would not be sharded"
        )


def shard_within_groups(accelerator: Accelerator, dp_replicate_size: int) -> None:
    """Have FSDP2 shard over groups of neighbouring ranks, and keep a copy in each.

    Not by the argument `parallelism_config`: Accelerate checks it before FSDP is on (see above).

    **Collective:** every rank of the world must call, where there are groups: they are made.
    """
    if dp_replicate_size == 1:
        return
    parallelism = ParallelismConfig(
        dp_replicate_size=dp_replicate_size,
        dp_shard_size=accelerator.num_processes // dp_replicate_size,
    )
    accelerator.state.parallelism_config = parallelism
    # Not Accelerate's own mesh, which has no axis to shard over in groups of one rank.
    accelerator.state.device_mesh = init_device_mesh(
        accelerator.device.type,
        (parallelism.dp_replicate_size, parallelism.dp_shard_size),
        mesh_dim_names=tuple(parallelism.fsdp_dim_names),
    )
