"""Arrange the ranks of a run for what is not experts: FSDP's axes, and tensor parallelism's.

The experts have a mesh of their own (see `device_mesh`) over the same ranks. Here `tp` is
innermost: the ranks of a tp group split the layers that transformers' plan splits, and train on the
same rows.

    8 ranks, tp 2           tp 0   tp 1
                    dp 0     r0     r1        rows of data rank 0
                    dp 1     r2     r3        rows of data rank 1
                    dp 2     r4     r5
                    dp 3     r6     r7
"""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megablocks_utils.mesh.device_mesh import DP_REPLICATE_AXIS, axis_size

__all__ = ["DENSE_DP_AXIS", "TP_AXIS", "build_dense_mesh", "world_mesh"]

DENSE_DP_AXIS = "dp_shard_cp"
"""What Accelerate calls the axis that FSDP shards over."""
TP_AXIS = "tp"


def build_dense_mesh(
    device_type: str, *, tp_size: int = 1, dp_replicate_size: int = 1
) -> DeviceMesh | None:
    """Build the mesh of the dense parameters; None where FSDP shards over the world.

    **Collective:** every rank of the world must call, where there is a mesh: groups are made.
    """
    if tp_size == dp_replicate_size == 1:
        return None
    shape = {DENSE_DP_AXIS: dist.get_world_size() // dp_replicate_size // tp_size}
    if dp_replicate_size > 1:
        shape = {DP_REPLICATE_AXIS: dp_replicate_size, **shape}
    if tp_size > 1:
        shape[TP_AXIS] = tp_size
    return init_device_mesh(device_type, tuple(shape.values()), mesh_dim_names=tuple(shape))


def world_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """Return a mesh without a tp axis, for what sees each token on one rank alone.

    **Collective:** every rank of the world must call, where there is such an axis.
    """
    if mesh is None or axis_size(mesh, TP_AXIS) == 1:
        return mesh
    return init_device_mesh(mesh.device_type, (dist.get_world_size(),))
