"""Adapters of experts: where they lie, how they start, what stays frozen."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import Shard

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.lora.apply import ChosenAdapters, apply_lora
from megablocks_utils.lora.settings import LoraSettings
from megablocks_utils.shard_moe_utils import shard_moe
from tests.support.tiny_models import build_tiny_model

SETTINGS = LoraSettings(4, 8, expert_ranks={"gate_up_proj": 4, "down_proj": 4})
LORA = "model.layers.{}.mlp.experts.{}_proj_lora.lora_{}"


def _start(rank, ep_size, seed, dtype=torch.float32):
    """Return the whole adapters, the trainable names and the placements."""
    torch.rand(rank + 1)  # whatever was drawn before must not matter
    model = build_tiny_model("mixtral").to(dtype)
    sharded = shard_moe(model, ep_size)
    apply_lora(model, sharded, ChosenAdapters(SETTINGS), dtype=torch.float32, seed=seed)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trainable.values())
    assert all(p.dtype == dtype for name, p in model.named_parameters() if name not in trainable)
    assert all(p.device_mesh.mesh_dim_names == ("ep",) for p in trainable.values())
    assert all(p.placements == (Shard(0),) for p in trainable.values())
    assert all(len(p.to_local()) == 4 // ep_size for p in trainable.values())
    return {name: p.detach().full_tensor() for name, p in trainable.items()}


def test_only_adapters_of_experts_are_trained_and_lie_with_their_experts(ranks4):
    start = ranks4.run(_start, 2, 1, torch.bfloat16)[0]
    shapes = {"gate_up": ((4, 4, 64), (4, 192, 4)), "down": ((4, 4, 96), (4, 64, 4))}
    assert {name: tuple(p.shape) for name, p in start.items()} == {
        LORA.format(layer, projection, side): shapes[projection][side == "B"]
        for layer in (0, 1)
        for projection in shapes
        for side in "AB"
    }


def test_the_start_is_a_function_of_the_seed_not_of_the_mesh(ranks4):
    """Copies on the dp axis must be equal, and another ep size must be the same run."""
    starts = [start for ep_size in (1, 2, 4) for start in ranks4.run(_start, ep_size, 1)]
    other = ranks4.run(_start, 2, 2)[0]
    for name, wanted in starts[0].items():
        assert all(torch.equal(start[name], wanted) for start in starts), name
        assert torch.equal(other[name], wanted) == ("lora_B" in name)
    firsts = {p.flatten()[0].item() for name, p in starts[0].items() if "lora_A" in name}
    assert len(firsts) == 4  # no two adapters start alike


@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_the_start_is_distributed_as_pefts(ranks2, projection):
    """Uniform with PEFT's bound; B zero."""
    start = ranks2.run(_start, 2, 1)[0]
    target = f"mlp.experts.{projection}_proj"
    config = LoraConfig(r=4, target_modules=[], target_parameters=[target])
    peft_model = get_peft_model(build_tiny_model("mixtral"), config)
    stock = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    ours_a = start[LORA.format(0, projection, "A")]
    (stock_a, _) = (p for n, p in stock.items() if "lora_A" in n)
    bound = 1 / math.sqrt(ours_a.shape[-1])
    for values in (ours_a, stock_a.detach()):
        assert 0.99 * bound < values.abs().max() <= bound
        # 1024 or more values: the standard error of the mean square is below 3%.
        assert values.square().mean().item() == pytest.approx(bound**2 / 3, rel=0.12)
    assert not start[LORA.format(0, projection, "B")].any()
    assert not any(p.any() for n, p in stock.items() if "lora_B" in n)


def _memory_of_adapters(rank):
    model = build_tiny_model("mixtral")
    sharded = shard_moe(model, dist.get_world_size())
    apply_lora(model, sharded, ChosenAdapters(SETTINGS), dtype=torch.float32, seed=0)
    locals_ = [p.to_local() for p in model.parameters() if p.requires_grad]
    return [(p.untyped_storage().nbytes(), p.numel() * 4) for p in locals_]


def test_a_rank_keeps_no_memory_of_other_ranks_adapters(ranks2):
    for held, needed in ranks2.run(_memory_of_adapters)[0]:
        assert held == needed


def _attach_to_backend(rank, name):
    model = build_tiny_model("mixtral")
    sharded = shard_moe(model, dist.get_world_size())
    sharded = replace(sharded, kernel=replace(sharded.kernel, name=name))
    apply_lora(model, sharded, ChosenAdapters(SETTINGS), dtype=torch.float32, seed=0)


def _refuse_adapters(rank, name):
    with pytest.raises(ConfigurationError) as refusal:
        _attach_to_backend(rank, name)
    return str(refusal.value)


@pytest.mark.parametrize("name", ["scattermoe", "megablocks"])
def test_backends_without_adapters_get_none(ranks2, name):
    """What `shard_moe` with that kernel returns, as a Python user may have it."""
    sentence = (
        f"the experts run on {name}, which has no adapters; shard_moe with kernel auto, triton, "
        "grouped_mm or eager makes experts that have them."
    )
    assert ranks2.run(_refuse_adapters, name) == [sentence] * 2
    ranks2.run(_attach_to_backend, "triton")
