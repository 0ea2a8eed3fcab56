"""The global norm, clipping and the sum over replicas, against one process's numbers."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from megablocks_utils.fsdp.gradients import clip_gradients, global_grad_norm, sum_replica_gradients
from megablocks_utils.mesh.device_mesh import MeshSizes, build_mesh
from megablocks_utils.mesh.placement import distribute_experts
from tests.support.compare import relative_error


def _gradients():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 3, generator=generator), torch.randn(4, 5, generator=generator)


def _clip(rank, ep_size, max_norm):
    """A dense gradient sharded over the world, an expert's over ep, and one that is missing."""
    dense_grad, expert_grad = _gradients()
    world = init_device_mesh("cpu", (4,))
    mesh = build_mesh(MeshSizes(4 // ep_size, ep_size), "cpu")
    dense = Parameter(distribute_tensor(torch.zeros(8, 3), world, [Shard(0)]))
    experts = Parameter(distribute_experts(torch.zeros(4, 5), mesh))
    dense.grad = distribute_tensor(dense_grad, world, [Shard(0)])
    experts.grad = distribute_experts(expert_grad, mesh)
    norm = clip_gradients([dense, experts, Parameter(torch.zeros(2))], max_norm)
    return norm, dense.grad.full_tensor(), experts.grad.full_tensor()


@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e3])  # off, clips, does not clip
def test_clip_equals_torch_on_one_process(ranks4, ep_size, max_norm):
    parameters = [Parameter(torch.zeros_like(grad)) for grad in _gradients()]
    for parameter, grad in zip(parameters, _gradients(), strict=True):
        parameter.grad = grad
    limit = max_norm or float("inf")
    wanted_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    for norm, *grads in ranks4.run(_clip, ep_size, max_norm):
        assert relative_error(norm, wanted_norm) < 1e-6
        for grad, parameter in zip(grads, parameters, strict=True):
            assert relative_error(grad, parameter.grad) < 1e-6


def _norm_of_rank_shards(rank):
    """Plain tensors are this rank's own shards; one rank has no gradient at all."""
    shard = Parameter(torch.zeros(2))
    shard.grad = torch.tensor([3.0, 4.0]) * rank if rank else None
    return global_grad_norm([shard])


def test_norm_over_plain_shards(ranks2):
    assert [norm.item() for norm in ranks2.run(_norm_of_rank_shards)] == [5.0, 5.0]


def _sum(rank, ep_size):
    mesh = build_mesh(MeshSizes(4 // ep_size, ep_size), "cpu")
    experts = Parameter(distribute_experts(torch.zeros(4, 1), mesh))
    experts.grad = distribute_experts(torch.ones(4, 1), mesh) * (1 + rank)
    frozen = Parameter(distribute_experts(torch.zeros(4, 1), mesh), requires_grad=False)
    uncalled = Parameter(distribute_experts(torch.zeros(4, 1), mesh))
    sum_replica_gradients([uncalled, experts, frozen], mesh)
    assert uncalled.grad is None
    return experts.grad.to_local().flatten().tolist()


def test_sum_over_the_ranks_that_hold_the_same_experts(ranks4):
    """Rank r brings r + 1: at ep 2 ranks 0 and 2 are copies (1 + 3), ranks 1 and 3 too (2 + 4)."""
    assert ranks4.run(_sum, 1) == [[10.0] * 4] * 4
    assert ranks4.run(_sum, 2) == [[4.0, 4.0], [6.0, 6.0]] * 2
    assert ranks4.run(_sum, 4) == [[1.0], [2.0], [3.0], [4.0]]
