"""Which rank holds which experts, and how many ranks hold the same."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard

from megablocks_utils.mesh.device_mesh import MeshSizes, build_mesh
from megablocks_utils.mesh.placement import count_replicas, distribute_experts, local_tensor
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
