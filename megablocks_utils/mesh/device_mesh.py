"""Arrange the ranks of a run into the ("dp", "ep") mesh of the experts.

The `ep` axis splits the experts of a layer; the `dp` axis counts the ranks that hold the *same*
experts. That is not the data parallelism of the batch: every rank of the world, also inside one ep
group, works on its own tokens.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megablocks_utils.config.parallel import check_ep_size

DP_AXIS = "dp"
EP_AXIS = "ep"


@dataclass(frozen=True)
class MeshSizes:
    """Sizes of the two axes; `dp_size * ep_size` is the world size."""

    dp_size: int
    ep_size: int


def compute_mesh_sizes(world_size: int, ep_size: int, num_experts: int) -> MeshSizes:
    """Check that the experts and the ranks divide evenly and return the axis sizes.

    Raises:
        ConfigurationError: ep_size does not divide the world size or the number of experts.
    """
    check_ep_size(ep_size, world_size=world_size, num_experts=num_experts)
    return MeshSizes(dp_size=world_size // ep_size, ep_size=ep_size)


def axis_size(mesh: DeviceMesh, axis: str) -> int:
    """Return how many ranks an axis has, without making a mesh of it."""
    assert mesh.mesh_dim_names is not None, mesh
    return mesh.size(mesh.mesh_dim_names.index(axis))


def build_mesh(sizes: MeshSizes, device_type: str) -> DeviceMesh:
    """Build the device mesh with axes ("dp", "ep"), ep innermost.

    Neighbouring ranks share the fast link of a node, so the all-to-all of tokens runs there, in a
    group of its own: NCCL runs one collective of a group at a time, and FSDP's are on the world.

    **Collective:** every rank of the world must call (process groups are created).
    """
    is_world = sizes.dp_size == 1 and sizes.ep_size > 1
    return init_device_mesh(
        device_type,
        (sizes.dp_size, sizes.ep_size),
        mesh_dim_names=(DP_AXIS, EP_AXIS),
        # Else torch takes the world's group for an axis of that size.
        backend_override={EP_AXIS: dist.get_backend()} if is_world else None,
    )
