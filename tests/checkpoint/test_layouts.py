"""Naming on the Hub: one table, the same answer in both directions."""

import pytest

from megablocks_utils.checkpoint.layouts import (
    EXPERT_TENSORS,
    FUSED,
    ExpertPart,
    MemoryPart,
    detect_naming,
    is_expert_parameter,
    naming_of_family,
)
from megablocks_utils.errors import CheckpointError
from megablocks_utils.families import SUPPORTED_MODEL_TYPES

EXPERTS = "model.layers.3.mlp.experts"
MIXTRAL, QWEN_MOE = naming_of_family("mixtral"), naming_of_family("olmoe")


def test_supported_model_types():
    assert SUPPORTED_MODEL_TYPES == ("mixtral", "qwen3_moe", "olmoe")


def test_mixtral_parts_by_hand():
    hub = "model.layers.3.block_sparse_moe.experts.2"
    assert list(MIXTRAL.expert_parts(f"{EXPERTS}.gate_up_proj", [2])) == [
        ExpertPart(f"{hub}.w1.weight", 2, 0, 2, is_fused=False),
        ExpertPart(f"{hub}.w3.weight", 2, 1, 2, is_fused=False),
    ]
    assert list(MIXTRAL.expert_parts(f"{EXPERTS}.down_proj", [2])) == [
        ExpertPart(f"{hub}.w2.weight", 2, 0, 1, is_fused=False)
    ]
    router = "model.layers.3.mlp.gate.weight"
    assert MIXTRAL.hub_key(router) == "model.layers.3.block_sparse_moe.gate.weight"


def test_qwen_parts_by_hand():
    keys = [part.key for part in QWEN_MOE.expert_parts(f"{EXPERTS}.gate_up_proj", [0, 5])]
    assert keys == [f"{EXPERTS}.{e}.{p}_proj.weight" for e in (0, 5) for p in ("gate", "up")]
    router = "model.layers.3.mlp.gate.weight"
    assert QWEN_MOE.hub_key(router) == router


def test_rows_and_shapes_of_a_part():
    gate, up = MIXTRAL.expert_parts(f"{EXPERTS}.gate_up_proj", [0])
    assert (gate.rows(192), up.rows(192)) == (slice(0, 96), slice(96, 192))
    assert up.hub_shape((4, 192, 64)) == (96, 64)
    (fused,) = FUSED.expert_parts(f"{EXPERTS}.gate_up_proj", [1])
    assert (fused.rows(192), fused.hub_shape((4, 192, 64))) == (slice(0, 192), (4, 192, 64))


@pytest.mark.parametrize("naming", [MIXTRAL, QWEN_MOE], ids=lambda naming: naming.name)
@pytest.mark.parametrize("tensor", list(EXPERT_TENSORS))
def test_way_back_of_expert_parts(naming, tensor):
    name = f"{EXPERTS}.{tensor}"
    for part in naming.expert_parts(name, range(3)):
        assert naming.memory_part(part.key) == MemoryPart(name, part.expert, part.share)
        assert naming.matches(part.key)


@pytest.mark.parametrize("naming", [MIXTRAL, QWEN_MOE, FUSED], ids=lambda naming: naming.name)
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.3.mlp.gate_proj.weight",
        "lm_head.weight",
    ],
)
def test_way_back_of_other_parameters(naming, name):
    assert naming.memory_part(naming.hub_key(name)) == MemoryPart(name)
    assert not naming.matches(naming.hub_key(name))
    assert not is_expert_parameter(name)


def test_detection_goes_by_keys():
    for naming in (MIXTRAL, QWEN_MOE, FUSED):
        (part,) = naming.expert_parts(f"{EXPERTS}.down_proj", [7])
        assert detect_naming(["lm_head.weight", part.key]) is naming


def test_no_experts_is_said():
    keys = ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.experts.gate.weight"]
    with pytest.raises(CheckpointError) as error:
        detect_naming(keys, source="/models/x")
    known = "mixtral, qwen_moe, fused"
    message = f"/models/x has no expert weights in a known naming ({known}); it has {keys[1]}"
    assert str(error.value) == message
