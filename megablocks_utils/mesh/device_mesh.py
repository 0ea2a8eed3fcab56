"""Arrange the ranks of a run into the ("dp", "ep") mesh of the experts.

The `ep` axis splits the experts of a layer; the `dp` axis counts the ranks that hold the *same*
experts. That is not the data parallelism of the batch: every rank of the world, also inside one ep
group, works on its own tokens.

With HSDP an axis "dp_replicate" comes first, for groups that each hold the whole model:

    8 ranks, 2 groups, ep 2        group 0           group 1
                               ep 0   ep 1       ep 0   ep 1
                        dp 0    r0     r1         r4     r5
                        dp 1    r2     r3         r6     r7
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megablocks_utils.config.parallel import check_ep_size, count_shard_ranks

DP_REPLICATE_AXIS = "dp_replicate"
DP_AXIS = "dp"
EP_AXIS = "ep"


@dataclass(frozen=True)
class MeshSizes:
    """Sizes of the axes; `dp_replicate_size * dp_size * ep_size` is the world size."""

    dp_size: int
    ep_size: int
    dp_replicate_size: int = 1


def compute_mesh_sizes(
    world_size: int, ep_size: int, num_experts: int, dp_replicate_size: int = 1
) -> MeshSizes:
    """Check that the experts and the ranks divide evenly and return the axis sizes.

    Raises:
        ConfigurationError: ep_size does not divide the ranks of a group or the number of experts.
    """
    num_ranks = count_shard_ranks(world_size, dp_replicate_size)
    check_ep_size(
        ep_size, world_size=num_ranks, num_experts=num_experts, num_groups=dp_replicate_size
    )
    return MeshSizes(num_ranks // ep_size, ep_size, dp_replicate_size)


def axis_size(mesh: DeviceMesh, axis: str) -> int:
    """Return how many ranks an axis has, without making a mesh of it; 1 where there is none."""
    assert mesh.mesh_dim_names is not None, mesh
    if axis not in mesh.mesh_dim_names:
        return 1
    return mesh.size(mesh.mesh_dim_names.index(axis))


def copy_axes(mesh: DeviceMesh) -> Sequence[str]:
    """Return the axes along which ranks hold the same experts, those of more than one rank."""
    return [axis for axis in (DP_REPLICATE_AXIS, DP_AXIS) if axis_size(mesh, axis) > 1]


def build_mesh(sizes: MeshSizes, device_type: str) -> DeviceMesh:
    """Build the device mesh with axes ("dp", "ep"), ep innermost; "dp_replicate" where it counts.

    Neighbouring ranks share the fast link of a node, so the all-to-all of tokens runs there, in a
    group of its own: NCCL runs one collective of a group at a time, and FSDP's are on the world.

    **Collective:** every rank of the world must call (process groups are created).
    """
    shape = {DP_AXIS: sizes.dp_size, EP_AXIS: sizes.ep_size}
    if sizes.dp_replicate_size > 1:
        shape = {DP_REPLICATE_AXIS: sizes.dp_replicate_size, **shape}
    is_world = sizes.ep_size == prod(shape.values()) > 1
    return init_device_mesh(
        device_type,
        tuple(shape.values()),
        mesh_dim_names=tuple(shape),
        # Else torch takes the world's group for an axis of that size.
        backend_override={EP_AXIS: dist.get_backend()} if is_world else None,
    )
