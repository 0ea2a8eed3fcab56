"""Arrange the ranks of a run into the ("dp", "ep") mesh of the experts.

The `ep` axis splits the experts of a layer; the `dp` axis counts the ranks that hold the *same*
experts. That is not the data parallelism of the batch: every rank of the world, also inside one ep
group, works on its own tokens.

With HSDP an axis "dp_replicate" comes first, for groups that each hold the whole model:

    8 ranks, 2 groups, ep 2        group 0           group 1
                               ep 0   ep 1       ep 0   ep 1
                        dp 0    r0     r1         r4     r5
                        dp 1    r2     r3         r6     r7

With expert tensor parallelism an axis "expert_tp" comes last: its ranks hold slices of the same
experts, cut along the intermediate size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megablocks_utils.config.parallel import (
    check_ep_size,
    count_ranks_of_slice,
    count_shard_ranks,
)

DP_REPLICATE_AXIS = "dp_replicate"
DP_AXIS = "dp"
EP_AXIS = "ep"
EXPERT_TP_AXIS = "expert_tp"


@dataclass(frozen=True)
class MeshSizes:
    """Sizes of the axes; their product is the world size."""

    dp_size: int
    ep_size: int
    dp_replicate_size: int = 1
    expert_tp_size: int = 1


def compute_mesh_sizes(
    world_size: int,
    ep_size: int,
    num_experts: int,
    dp_replicate_size: int = 1,
    expert_tp_size: int = 1,
) -> MeshSizes:
    """Check that the experts and the ranks divide evenly and return the axis sizes.

    Raises:
        ConfigurationError: a size does not divide the ranks of a group, or ep_size the number of
            experts.
    """
    num_ranks = count_shard_ranks(world_size, dp_replicate_size)
    num_ranks = count_ranks_of_slice(num_ranks, expert_tp_size, dp_replicate_size)
    check_ep_size(
        ep_size,
        world_size=num_ranks,
        num_experts=num_experts,
        num_groups=dp_replicate_size,
        expert_tp_size=expert_tp_size,
    )
    return MeshSizes(num_ranks // ep_size, ep_size, dp_replicate_size, expert_tp_size)


def axis_size(mesh: DeviceMesh, axis: str) -> int:
    """Return how many ranks an axis has, without making a mesh of it; 1 where there is none."""
    assert mesh.mesh_dim_names is not None, mesh
    if axis not in mesh.mesh_dim_names:
        return 1
    return mesh.size(mesh.mesh_dim_names.index(axis))


def copy_axes(mesh: DeviceMesh) -> Sequence[str]:
    """Return the axes along which ranks hold the same part of experts, if of more than one rank."""
    return [axis for axis in (DP_REPLICATE_AXIS, DP_AXIS) if axis_size(mesh, axis) > 1]


def build_mesh(sizes: MeshSizes, device_type: str) -> DeviceMesh:
    """Build the device mesh with axes ("dp", "ep"), ep innermost; others where they count.

    "dp_replicate" comes before them and "expert_tp" behind. Neighbouring ranks share the fast link
    of a node, so tokens are exchanged there, in groups of their own: NCCL runs one collective of a
    group at a time, and FSDP's are on the world.

    **Collective:** every rank of the world must call (process groups are created).
    """
    shape = {DP_AXIS: sizes.dp_size, EP_AXIS: sizes.ep_size}
    if sizes.dp_replicate_size > 1:
        shape = {DP_REPLICATE_AXIS: sizes.dp_replicate_size, **shape}
    if sizes.expert_tp_size > 1:
        shape[EXPERT_TP_AXIS] = sizes.expert_tp_size
    world_size = prod(shape.values())
    # Else torch takes the world's group for an axis of that size.
    own = [axis for axis in (EP_AXIS, EXPERT_TP_AXIS) if shape.get(axis) == world_size > 1]
    return init_device_mesh(
        device_type,
        tuple(shape.values()),
        mesh_dim_names=tuple(shape),
        backend_override=dict.fromkeys(own, dist.get_backend()) or None,
    )
