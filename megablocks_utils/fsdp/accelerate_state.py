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
from torch.distributed.device_mesh import DeviceMesh

from megablocks_utils.mesh.dense_mesh import DENSE_DP_AXIS
from megablocks_utils.mesh.device_mesh import DP_REPLICATE_AXIS, axis_size

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


def shard_over_mesh(accelerator: Accelerator, mesh: DeviceMesh | None) -> None:
    """Have FSDP2 shard over an axis of a mesh, and keep a copy along each other.

    Not by the argument `parallelism_config`: Accelerate checks it before FSDP is on (see above).

    Args:
        accelerator: with FSDP on.
        mesh: of the dense parameters, see `mesh.dense_mesh`; None: FSDP shards over the world.
    """
    if mesh is None:
        return
    # Of a tp axis Accelerate is not told: it would split the model itself.
    parallelism = ParallelismConfig(
        dp_replicate_size=axis_size(mesh, DP_REPLICATE_AXIS),
        dp_shard_size=axis_size(mesh, DENSE_DP_AXIS),
    )
    assert DENSE_DP_AXIS in parallelism.fsdp_dim_names, parallelism
    accelerator.state.parallelism_config = parallelism
    # Not Accelerate's own mesh, which has no axis to shard over in groups of one rank.
    accelerator.state.device_mesh = mesh
