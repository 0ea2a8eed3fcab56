"""Muon equals torch's for each whole matrix, however the matrices lie on the ranks."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import MixtralConfig, MixtralForCausalLM

from megablocks_utils.mesh.placement import DimSplit, distribute_experts, local_blocks
from megablocks_utils.training.step.muon import find_matrices
from megablocks_utils.training.step.optimizer import build_optimizer
from megablocks_utils.training.step.routers import recognize_routers

SHAPES = {"a": (12, 7), "b": (3, 20), "c": (9, 9)}
SHAPES |= {"gate_up": (4, 8, 6), "down": (4, 6, 4), "n": (7,)}
PLACES = {
    "FSDP2": dict.fromkeys("abcn", "rows") | {"gate_up": "ep", "down": "ep"},
    "experts over dp": dict.fromkeys("abcn", "rows") | {"gate_up": "both", "down": "inside"},
    "expert_tp": dict.fromkeys("abc", "two axes")
    | {"n": "rows", "gate_up": "gates and ups", "down": "columns"},
}


def make_values(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def place(value, kind):
    world = init_device_mesh("cpu", (4,), mesh_dim_names=("world",))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    if kind in ("gates and ups", "columns"):
        slices = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "ep", "expert_tp"))
        return distribute_experts(value, slices, DimSplit(1, 2) if kind[0] == "g" else DimSplit(2))
    axes, placements = {
        "rows": (world, [Shard(0)]),
        "ep": (mesh, [Replicate(), Shard(0)]),
        "both": (mesh, [Shard(0), Shard(0)]),
        "inside": (mesh, [Shard(1), Shard(0)]),
        "two axes": (mesh, [Shard(0), Shard(1)]),
    }[kind]
    return distribute_tensor(value, axes, placements)


def train(rank, places, dtype=torch.float32, num_steps=3):
    """Train placed parameters; return this rank's blocks, where they lie, and a state's dtype."""
    initial = make_values(0)
    named = {
        name: torch.nn.Parameter(place(value.to(dtype), places[name]))
        for name, value in initial.items()
    }
    precision = SimpleNamespace(optim="float32", stochastic_rounding=dtype == torch.bfloat16)
    config = SimpleNamespace(learning_rate=0.02, weight_decay=0.1)
    optimizer = build_optimizer(
        named.items(), config, precision, seed=1, matrices=set(SHAPES) - {"n"}
    )
    for step in range(num_steps):
        for name, gradient in make_values(step + 1).items():
            named[name].grad = place(gradient.to(dtype), places[name])
        optimizer.step()
    return {
        name: [(b.offsets, b.of(p.detach().to_local()).clone()) for b in local_blocks(p)]
        for name, p in named.items()
    }


def train_with_torch(num_steps=3):
    """Train every matrix by itself with torch's Muon, and the vector with its AdamW."""
    pieces = {
        name: [torch.nn.Parameter(m) for m in (value if value.dim() == 3 else [value])]
        for name, value in make_values(0).items()
    }
    matrices = [m for found in pieces.values() for m in found if m.dim() == 2]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW(pieces["n"], lr=0.02, weight_decay=0.1)
    for step in range(num_steps):
        for name, gradient in make_values(step + 1).items():
            for piece, part in zip(
                pieces[name], gradient if gradient.dim() == 3 else [gradient], strict=True
            ):
                piece.grad = part.clone()
        muon.step()
        adamw.step()
    return {
        name: (torch.stack if len(SHAPES[name]) == 3 else next)(
            [p.detach() for p in found] if len(SHAPES[name]) == 3 else (p.detach() for p in found)
        )
        for name, found in pieces.items()
    }


@pytest.mark.parametrize("layout", PLACES)
def test_an_update_is_that_of_torch_for_whole_matrices(ranks4, layout):
    wanted = train_with_torch()
    seen = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for answer in ranks4.run(train, PLACES[layout]):
        for name, blocks in answer.items():
            for offsets, block in blocks:
                own = tuple(slice(o, o + n) for o, n in zip(offsets, block.shape, strict=True))
                torch.testing.assert_close(block, wanted[name][own], rtol=1e-6, atol=1e-6)
                seen[name][own] = 1
    assert all(where.all() for where in seen.values())


def test_copies_of_bf16_weights_get_the_same_random_bits(ranks4):
    answers = ranks4.run(train, PLACES["FSDP2"], torch.bfloat16)
    for mine, copy in ((0, 2), (1, 3)):
        for (_, one), (_, other) in zip(
            answers[mine]["gate_up"], answers[copy]["gate_up"], strict=True
        ):
            assert torch.equal(one, other)


def test_matrices_are_linear_layers_and_experts_without_router_and_head():
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        vocab_size=32,
    )
    model = MixtralForCausalLM(config)
    names = find_matrices(model, recognize_routers(model))
    layer = "model.layers.0."
    assert names == {
        *(f"{layer}self_attn.{name}_proj.weight" for name in "qkvo"),
        f"{layer}mlp.experts.gate_up_proj",
        f"{layer}mlp.experts.down_proj",
    }
