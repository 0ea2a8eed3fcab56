"""Which rank holds which experts, and how many ranks hold the same."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from megablocks_utils.mesh.device_mesh import MeshSizes, build_mesh
from megablocks_utils.mesh.placement import (
    DimSplit,
    count_replicas,
    distribute_experts,
    local_blocks,
    local_tensor,
)
from tests.support.compare import relative_error

EXPERTS = torch.arange(4 * 2 * 3.0).view(4, 2, 3)


def _hold(rank, ep_size):
    mesh = build_mesh(MeshSizes(4 // ep_size, ep_size), "cpu")
    sharded = distribute_experts(EXPERTS, mesh)
    local = local_tensor(sharded)
    owns_its_memory = local.untyped_storage().nbytes() == local.numel() * local.element_size()
    return local, sharded.full_tensor(), sharded.placements, owns_its_memory


def test_experts_are_split_over_ep_and_copied_over_dp(ranks4):
    for ep_size in (1, 2, 4):
        for rank, (local, full, placements, owns) in enumerate(ranks4.run(_hold, ep_size)):
            assert torch.equal(local, EXPERTS.chunk(ep_size)[rank % ep_size])
            assert torch.equal(full, EXPERTS)
            assert placements == (Shard(0),)
            assert owns


def _count(rank):
    mesh = build_mesh(MeshSizes(2, 2), "cpu")
    copied = distribute_experts(EXPERTS, mesh)
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(distribute_experts(EXPERTS, mesh))
    fully_shard(holder, mesh=mesh["dp"])
    world = init_device_mesh("cpu", (4,))
    dense = torch.distributed.tensor.distribute_tensor(EXPERTS, world, [Shard(0)])
    whole = torch.distributed.tensor.distribute_tensor(EXPERTS, world, [Replicate()])
    tensors = (copied, holder.weight, dense, whole, EXPERTS)
    return [count_replicas(tensor, 4) for tensor in tensors]


def test_count_replicas(ranks4):
    """Copies over dp: 2. Sharded over dp as well (a strided shard): 1. A plain tensor: 1."""
    assert ranks4.run(_count) == [[2, 1, 1, 4, 1]] * 4


def test_relative_error_of_zero_is_absolute():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0


def _indices(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def _shard_over_dp(tensor, mesh, dim):
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(distribute_experts(tensor, mesh))
    fully_shard(holder, mesh=mesh["dp"], shard_placement_fn=lambda _: Shard(dim))
    return holder.weight.detach()


def _slices(tensor, grid, split, dp_dim=None):
    """Split over ep 1 and expert_tp 2, and over dp 2 as FSDP2 does."""
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(distribute_experts(tensor, grid, split))
    if dp_dim is not None:
        fully_shard(holder, mesh=grid["dp"], shard_placement_fn=lambda _: Shard(dp_dim))
    assert torch.equal(holder.weight.detach().full_tensor(), tensor)
    return holder.weight.detach()


def _check_blocks(rank, name):
    """Cut this rank's part out of the whole tensor at its blocks, and compare with what it has."""
    world = init_device_mesh("cpu", (4,))
    grid = build_mesh(MeshSizes(2, 2), "cpu")
    sliced, both = (build_mesh(MeshSizes(4 // ep // 2, ep, 1, 2), "cpu") for ep in (1, 2))
    shape, place = {
        "dense, uneven": ((10, 3), lambda t: distribute_tensor(t, world, [Shard(0)])),
        "dense, fewer rows than ranks": ((3, 2), lambda t: distribute_tensor(t, world, [Shard(0)])),
        "whole": ((5, 2), lambda t: distribute_tensor(t, world, [Replicate()])),
        "two plain shards": ((9, 2), lambda t: distribute_tensor(t, grid, [Shard(0), Shard(0)])),
        "experts, copies": ((4, 2, 3), lambda t: distribute_experts(t, grid)),
        "experts, dp on experts": ((8, 2, 3), lambda t: _shard_over_dp(t, grid, 0)),
        "experts, dp on rows": ((2, 6, 3), lambda t: _shard_over_dp(t, grid, 1)),
        "experts, dp on columns": ((2, 3, 6), lambda t: _shard_over_dp(t, grid, 2)),
        "fewer experts than ranks": ((2, 3, 3), lambda t: _shard_over_dp(t, grid, 0)),
        "three experts a rank": ((6, 3, 3), lambda t: _shard_over_dp(t, grid, 0)),
        "slices": ((2, 3, 6), lambda t: _slices(t, sliced, DimSplit(2))),
        "slices in parts": ((4, 8, 3), lambda t: _slices(t, both, DimSplit(1, 2))),
        "slices in parts, dp on experts": (
            (4, 8, 3),
            lambda t: _slices(t, sliced, DimSplit(1, 2), 0),
        ),
        "slices in parts, dp on columns": (
            (3, 8, 4),
            lambda t: _slices(t, sliced, DimSplit(1, 2), 2),
        ),
        "slices, whole, dp on experts": ((4, 3), lambda t: _slices(t, sliced, None, 0)),
        "plain": ((4, 2), lambda t: t),
    }[name]
    whole = _indices(*shape)
    placed = place(whole)
    mine = local_tensor(placed)
    rebuilt = torch.full_like(mine, -1)
    for block in local_blocks(placed):
        window = tuple(slice(o, o + n) for o, n in zip(block.offsets, block.sizes, strict=True))
        block.of(rebuilt).copy_(whole[window])
    assert torch.equal(mine, rebuilt)
    return mine.flatten().tolist()


@pytest.mark.parametrize(
    ("name", "copies"),
    [
        ("dense, uneven", 1),
        ("dense, fewer rows than ranks", 1),
        ("whole", 4),
        ("two plain shards", 1),
        ("experts, copies", 2),
        ("experts, dp on experts", 1),
        ("experts, dp on rows", 1),
        ("experts, dp on columns", 1),
        ("fewer experts than ranks", 1),
        ("three experts a rank", 1),
        ("slices", 2),
        ("slices in parts", 1),
        ("slices in parts, dp on experts", 1),
        ("slices in parts, dp on columns", 1),
        ("slices, whole, dp on experts", 2),
        ("plain", 4),
    ],
)
def test_local_blocks(ranks4, name, copies):
    """Every element is in a block of a rank, `copies` times: its value is its global index."""
    held = sorted(value for part in ranks4.run(_check_blocks, name) for value in part)
    assert held == [float(n) for n in range(len(held) // copies) for _ in range(copies)]
