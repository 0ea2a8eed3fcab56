"""Mesh sizes and coordinates, also of worlds larger than this machine (fake process group)."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.mesh.device_mesh import MeshSizes, build_mesh, compute_mesh_sizes
from megablocks_utils.mesh.placement import local_expert_range
from tests.support.rank_pool import start_forkserver

# World size, ep size, number of experts and rank -> axes, place on dp, its experts, its ep group,
# and whether that is a group of its own.
COORDINATES = {
    "8 4 8 6": "('dp', 'ep') 1 [4, 5] [4, 5, 6, 7] True",  # ep innermost: neighbours exchange
    "16 8 8 9": "('dp', 'ep') 1 [1] [8, 9, 10, 11, 12, 13, 14, 15] True",
    "16 2 4 5": "('dp', 'ep') 2 [2, 3] [4, 5] True",
    "4 4 8 1": "('dp', 'ep') 0 [2, 3] [0, 1, 2, 3] True",  # FSDP's collectives are on the world
}


@pytest.mark.parametrize(
    ("world_size", "ep_size", "num_experts", "wanted"),
    [
        (8, 8, 8, MeshSizes(1, 8)),
        (8, 4, 8, MeshSizes(2, 4)),
        (8, 1, 8, MeshSizes(8, 1)),
        (16, 8, 128, MeshSizes(2, 8)),
    ],
)
def test_mesh_sizes(world_size, ep_size, num_experts, wanted):
    assert compute_mesh_sizes(world_size, ep_size, num_experts) == wanted


@pytest.mark.parametrize(
    ("ep_size", "what"),
    [
        (0, "8 processes of this run"),
        (3, "8 processes of this run"),
        (8, "4 experts of this model"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(ep_size, what):
    with pytest.raises(ConfigurationError) as refusal:
        compute_mesh_sizes(world_size=8, ep_size=ep_size, num_experts=4)
    assert str(refusal.value) == (
        f"ep_size is {ep_size}, but it must divide the {what}; 1, 2 and 4 would work."
    )
    assert refusal.value.parameters == ("ep_size",)


def describe_coordinates(world: str) -> str:
    """Say where a rank of a world is, in a process that is in no other world."""
    world_size, ep_size, num_experts, rank = map(int, world.split())
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    mesh = build_mesh(compute_mesh_sizes(world_size, ep_size, num_experts), "cpu")
    mine = local_expert_range(num_experts, mesh)
    group = mesh.get_group("ep")
    place = mesh["dp"].get_local_rank(), list(mine), dist.get_process_group_ranks(group)
    seen = " ".join(map(str, (mesh.mesh_dim_names, *place, group is not dist.group.WORLD)))
    dist.destroy_process_group()
    return seen


def test_coordinates_of_a_rank():
    start_forkserver()
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as process:
        seen = list(process.map(describe_coordinates, COORDINATES))
    assert seen == list(COORDINATES.values())
