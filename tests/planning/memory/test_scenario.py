"""A planned run is what the scripts would make of the same options."""

from dataclasses import replace

import pytest
from transformers import MixtralConfig

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.memory.scenario import read_shape
from megablocks_utils.planning.model.prediction import ParallelLayout
from megablocks_utils.training.step.aux_loss import resolve_aux_loss_coef
from tests.planning.cases import build_scenario, read_model


def test_options_become_what_the_formulas_ask_for():
    run = build_scenario("--use_lora all --lora_r 4", world_size=4).planned_run()
    assert (run.use_lora, run.lora_r, run.world_size) == ("all", 4, 4)
    assert (run.precision.name, run.precision.optim) == ("mixed", "float32")  # LoRA on a GPU
    assert (run.sync_each_batch, run.accumulation) == (False, 1)
    assert run.tokens == run.label_tokens == 8 * 4096  # the scripts' own defaults
    assert run.examples == 8
    assert (run.gradient_checkpointing, run.kernel, run.imbalance) == ("full", "grouped_mm", 1.25)
    full = build_scenario("--gradient_checkpointing selective --gradient_accumulation_steps 3")
    run = full.planned_run()
    assert (run.precision.name, run.sync_each_batch, run.accumulation) == ("bf16_sr", True, 3)
    assert (run.gradient_checkpointing, run.lora_r, run.has_aux_loss) == ("selective", 16, False)


LAYOUTS = [
    ("", "fsdp2", (1, "shard")),
    ("--use_megablocks_sharding True", "fsdp2", (8, "shard")),
    ("--use_megablocks_sharding True --expert_dp replicate", "fsdp2", (8, "shard")),
    ("--use_megablocks_sharding True --ep_size 4", "fsdp2", (4, "shard")),
    ("--use_megablocks_sharding True --ep_size 4 --expert_dp replicate", "fsdp2", (4, "replicate")),
    ("--use_megablocks_sharding True --expert_tp_size 2", "fsdp2", (4, "shard")),
    (
        "--use_megablocks_sharding True --ep_size 1 --tp_size 2 --expert_dp replicate",
        "fsdp2",
        (1, "replicate", True),
    ),
    ("", "fsdp1", (1, "shard")),
    ("--use_megablocks_sharding True", "fsdp1", (8, "replicate")),
    ("--use_megablocks_sharding True --ep_size 2", "fsdp1", (2, "replicate")),
]


@pytest.mark.parametrize(("line", "entry_point", "layout"), LAYOUTS)
def test_the_layout_that_the_options_ask_for(line, entry_point, layout):
    scenario = build_scenario(line, entry_point=entry_point)
    assert scenario.own_layout() == ParallelLayout(*layout)
    assert scenario.own_layout() in scenario.legal_layouts()


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--tp_size 16", r"^tp_size is 16, but it must divide the heads .* 8 of keys\); 1, 2, 4"),
        (
            "--expert_tp_size 32768",
            r"^expert_tp_size is 32768, but it must divide the intermediate",
        ),
    ],
)
def test_what_cannot_be_cut_evenly_is_refused(option, reason):
    scenario = build_scenario(f"--use_megablocks_sharding True {option}", world_size=2**15)
    with pytest.raises(ConfigurationError, match=reason):
        scenario.legal_layouts()


def test_a_truncated_model_has_two_layers():
    whole, cut = build_scenario(), build_scenario("--truncate_model_for_debug True")
    assert (whole.shape.num_layers, cut.shape.num_layers) == (32, 2)
    a_layer = (whole.shape.num_parameters - cut.shape.num_parameters) // 30
    assert a_layer == whole.shape.layers[0].numel


@pytest.mark.parametrize("given", [None, 0.0, 0.01])
@pytest.mark.parametrize("is_on", [False, True])
@pytest.mark.parametrize("coef", [0.0, 0.02])
def test_the_load_balancing_loss_is_on_where_training_has_it_on(given, is_on, coef):
    scenario = build_scenario("" if given is None else f"--router_aux_loss_coef {given}")
    settings = {"output_router_logits": is_on, "router_aux_loss_coef": coef}
    shape = read_shape(scenario.config, read_model("mixtral-8x7b") | settings)
    trained = resolve_aux_loss_coef(MixtralConfig(**settings), given)
    assert replace(scenario, shape=shape).planned_run().has_aux_loss == (trained > 0)
