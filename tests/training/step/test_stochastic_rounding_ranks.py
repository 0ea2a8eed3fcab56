"""Stochastic rounding on connected ranks: equal on copies, different on shards, saved by DCP."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megablocks_utils.training.step.stochastic_rounding import (
    StochasticRoundingAdamW,
    shard_coordinate,
)


def update_equal_experts(rank, placement):
    """Step on experts that are all equal; return this rank's weights, states and coordinate.

    What then differs between ranks differs by its random bits alone.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    mesh, placements = {
        "ep only": (mesh["ep"], [Shard(0)]),
        "dp copies": (mesh, [Replicate(), Shard(0)]),
        "dp shards": (mesh, [Shard(1), Shard(0)]),
    }[placement]
    full = torch.ones(4, 32, 16, dtype=torch.bfloat16)
    weight = torch.nn.Parameter(distribute_tensor(full, mesh, placements))
    optimizer = StochasticRoundingAdamW([weight], lr=1e-3, seed=5)
    for _ in range(3):
        weight.grad = distribute_tensor(full, mesh, placements)
        optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg"].placements == state["exp_avg_sq"].placements == weight.placements
    local = [tensor.to_local() for tensor in (weight, state["exp_avg"], state["exp_avg_sq"])]
    return shard_coordinate(weight), [tensor.detach().clone() for tensor in local]


def all_equal(these, those):
    return [torch.equal(this, that) for this, that in zip(these, those, strict=True)]


@pytest.mark.parametrize("placement", ["ep only", "dp copies"])
def test_copies_of_an_expert_stay_bit_equal_and_other_experts_get_other_bits(ranks4, placement):
    answers = ranks4.run(update_equal_experts, placement)
    assert [coordinate for coordinate, _ in answers] == [(0,), (1,), (0,), (1,)]
    local = [tensors for _, tensors in answers]
    assert all_equal(local[0], local[2]) == all_equal(local[1], local[3]) == [True] * 3
    assert all_equal(local[0], local[1]) == [False] * 3
    assert (local[0][0] < 1).any()


def test_four_shards_get_four_sequences(ranks4):
    answers = ranks4.run(update_equal_experts, "dp shards")
    assert [coordinate for coordinate, _ in answers] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    local = [tensors for _, tensors in answers]
    for first in range(4):
        for second in range(first):
            assert all_equal(local[first], local[second]) == [False] * 3


def step_plain_tensor(rank, plain_shard_is_rank):
    weight = torch.nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
    optimizer = StochasticRoundingAdamW(
        [weight], lr=1e-3, plain_shard=rank if plain_shard_is_rank else 0
    )
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return weight.detach()


def test_plain_tensors_take_the_callers_shard(ranks2):
    first, second = ranks2.run(step_plain_tensor, False)
    assert torch.equal(first, second)
    first, second = ranks2.run(step_plain_tensor, True)
    assert not torch.equal(first, second)


class TwoMeshes(torch.nn.Module):
    """A dense weight over all ranks beside experts on ep alone."""

    def __init__(self, ep_mesh, world_mesh):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        dense = torch.randn(8, 6, generator=generator).bfloat16()
        experts = torch.randn(4, 3, 5, generator=generator).bfloat16()
        self.dense = torch.nn.Parameter(distribute_tensor(dense, world_mesh, [Shard(0)]))
        self.experts = torch.nn.Parameter(distribute_tensor(experts, ep_mesh, [Shard(0)]))


def train_sharded(model, optimizer, steps):
    for step in steps:
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(step)
            gradient = torch.randn(parameter.shape, generator=generator).bfloat16()
            parameter.grad = distribute_tensor(
                gradient, parameter.device_mesh, parameter.placements
            )
        optimizer.step()


def resume_through_dcp(rank, folder, state_dtype):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    world = init_device_mesh("cpu", (4,))
    options = {"lr": 1e-2, "state_dtype": state_dtype, "seed": 11}
    model = TwoMeshes(mesh["ep"], world)
    optimizer = StochasticRoundingAdamW(model.parameters(), **options)
    train_sharded(model, optimizer, range(3))
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=folder)

    resumed = TwoMeshes(mesh["ep"], world)
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer = StochasticRoundingAdamW(resumed.parameters(), **options)
    loaded = {"optimizer": get_optimizer_state_dict(resumed, resumed_optimizer)}
    dcp.load(loaded, checkpoint_id=folder)
    set_optimizer_state_dict(resumed, resumed_optimizer, loaded["optimizer"])
    kinds = [
        (isinstance(state["exp_avg"], DTensor), state["exp_avg"].dtype, float(state["step"]))
        for state in resumed_optimizer.state.values()
    ]
    train_sharded(model, optimizer, range(3, 6))
    train_sharded(resumed, resumed_optimizer, range(3, 6))
    pairs = zip(model.parameters(), resumed.parameters(), strict=True)
    equal = [torch.equal(ours.to_local(), theirs.to_local()) for ours, theirs in pairs]
    dist.barrier()
    return kinds, equal


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_distributed_checkpoint_continues_bit_equal(ranks4, tmp_path, state_dtype):
    for kinds, equal in ranks4.run(resume_through_dcp, str(tmp_path), state_dtype):
        assert kinds == [(True, state_dtype, 3.0)] * 2
        assert equal == [True, True]
