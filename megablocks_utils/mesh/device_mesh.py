"""Arrange the ranks of a run into the ("dp", "ep") mesh of the experts.

The `ep` axis splits the experts of a layer; the `dp` axis counts the ranks that hold the *same*
experts. That is not the data parallelism of the batch: every rank of the world, also inside one ep
group, works on its own tokens.
"""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megablocks_utils.errors import ConfigurationError

DP_AXIS = "dp"
EP_AXIS = "ep"


@dataclass(frozen=True)
class MeshSizes:
    """Sizes of the two axes; `dp_size * ep_size` is the world size."""

    dp_size: int
    ep_size: int


def legal_ep_sizes(world_size: int, num_experts: int) -> list[int]:
    """List every ep_size that divides both the world size and the number of experts."""
    return [n for n in range(1, world_size + 1) if world_size % n == 0 and num_experts % n == 0]


def compute_mesh_sizes(world_size: int, ep_size: int, num_experts: int) -> MeshSizes:
    """Check that the experts and the ranks divide evenly and return the axis sizes.

    Raises:
        ConfigurationError: ep_size does not divide the world size or the number of experts.
    """
    if ep_size < 1 or world_size % ep_size or num_experts % ep_size:
        choices = ", ".join(map(str, legal_ep_sizes(world_size, num_experts)))
        raise ConfigurationError(
            f"ep_size is {ep_size}, but it must divide the {world_size} processes of this run "
            f"and the {num_experts} experts of a layer; these would work: {choices}.",
            parameters=("ep_size",),
        )
    return MeshSizes(dp_size=world_size // ep_size, ep_size=ep_size)


def axis_size(mesh: DeviceMesh, axis: str) -> int:
    """Return how many ranks an axis has, without making a mesh of it."""
    assert mesh.mesh_dim_names is not None, mesh
    return mesh.size(mesh.mesh_dim_names.index(axis))


def build_mesh(sizes: MeshSizes, device_type: str) -> DeviceMesh:
    """Build the device mesh with axes ("dp", "ep"), ep innermost.

    Neighbouring ranks share the fast link of a node, so the all-to-all of tokens runs there.

    **Collective:** every rank of the world must call (process groups are created).
    """
    return init_device_mesh(
        device_type, (sizes.dp_size, sizes.ep_size), mesh_dim_names=(DP_AXIS, EP_AXIS)
    )
