"""A built model says to the formulas what its config.json says, and what they do not know."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from megablocks_utils.lora.apply import choose_adapters
from megablocks_utils.lora.linear_adapters import attach_linear_lora
from megablocks_utils.planning.memory.formula import legal_layouts, predict
from megablocks_utils.planning.memory.unit_builder import build_units
from megablocks_utils.planning.model.config_values import KNOWN_MODEL_TYPES
from megablocks_utils.planning.model.described_shape import shape_of
from megablocks_utils.planning.model.model_description import read_description, write_description
from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.prediction import ParallelLayout
from megablocks_utils.training.describe_model import describe_model
from tests.planning.cases import build_scenario
from tests.support.tiny_families import tiny_config


def describe(family, **more):
    with torch.device("meta"):
        return describe_model(AutoModelForCausalLM.from_config(tiny_config(family, **more)))


@pytest.mark.parametrize("family", KNOWN_MODEL_TYPES)
def test_both_ways_of_reading_a_model_plan_the_same(family):
    found = shape_of(read_description(write_description(describe(family))))
    read = ModelShape.from_config(tiny_config(family).to_dict())
    assert (found.not_known, found.routes_in_fp32) == ("", read.routes_in_fp32)
    adapters = [
        [{p.name: p.adapter for p in layer.parameters} for layer in s.layers] for s in (found, read)
    ]
    assert adapters[0] == adapters[1]
    wanted = {name: (p.shape, p.room) for name, p in read.named_parameters()}
    seen = {name: (p.shape, p.room) for name, p in found.named_parameters()}
    assert {n: shape for n, (shape, _) in seen.items()} == {n: s for n, (s, _) in wanted.items()}
    run = build_scenario().planned_run()
    for layout in legal_layouts(read, 8, "fsdp2"):
        told, again = predict(found, layout, run), predict(read, layout, run)
        assert told.peak_bytes == pytest.approx(again.peak_bytes, rel=1e-3)
        assert told.sent_bytes_per_step == again.sent_bytes_per_step


@pytest.mark.parametrize(
    ("family", "word"),
    [
        ("gpt_oss", "layers of several kinds"),
        ("nemotron_h", "experts other than gated SiLU"),
        ("qwen3_next", "layers of several kinds"),
        ("glm_moe_dsa", "indexer"),
        ("gemma4_text", "layers of several kinds"),
    ],
)
def test_what_the_formulas_do_not_know_is_named(family, word):
    shape = shape_of(describe(family))
    assert word in shape.not_known
    assert shape.attention is None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())


def test_adapters_hang_where_the_formulas_count_them():
    """Also on dense MLPs and shared experts."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("glm4_moe"))
    scenario = replace(
        build_scenario("--use_lora all --lora_r 4 --lora_alpha 8", world_size=1),
        shape=shape_of(describe_model(model)),
    )
    layout = ParallelLayout(1, "shard", is_dmoe=True)
    units = build_units(scenario.shape, layout, scenario.planned_run())
    counted = sum(unit.trained_numel for layer in units.layers for unit in layer.dense)
    settings = choose_adapters(model, scenario.config.adapter).settings
    attach_linear_lora(model, settings, dtype=torch.bfloat16, seed=0)
    attached = {n: p.numel() for n, p in model.named_parameters() if "lora_" in n}
    assert any("shared_experts" in name for name in attached)
    assert counted == sum(attached.values())


@pytest.mark.parametrize("family", ["glm4_moe", "minimax_m2", "glm4_moe_lite", "dots1"])
def test_families_that_no_config_reader_knows_are_planned_by_formula(family):
    shape = shape_of(describe(family))
    assert shape.not_known == ""
    scenario = replace(build_scenario(), shape=shape)
    assert scenario.predict(scenario.legal_layouts()[-1]).peak_bytes > 0


def test_what_text_does_not_train_is_not_planned_as_trained():
    description = describe("ernie4_5_moe")
    assert len(description.frozen) == 3  # the correction bias of each router
    shape = shape_of(description)
    run = build_scenario("--precision bf16", world_size=1).planned_run()
    units = build_units(shape, ParallelLayout(1, "shard"), run)
    trained = sum(p.numel for name, p in shape.named_parameters() if name not in description.frozen)
    assert sum(unit.trained_numel for unit in units.all()) == trained
    matrix = "model.layers.1.self_attn.q_proj.weight"
    frozen = shape_of(replace(description, frozen=(matrix,)))
    assert frozen.not_known == "self_attn.q_proj.weight without a gradient"
