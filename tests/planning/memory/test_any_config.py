"""Whatever a config.json says, there is a plan or a sentence: training must not die of its plan."""

import math

import pytest

from megablocks_utils.errors import UserError
from megablocks_utils.planning.memory.formula import legal_layouts, predict
from megablocks_utils.planning.model.model_shape import ModelShape
from tests.planning.cases import build_scenario, read_model

ODD_VALUES = (None, True, 0, -1, 1, 7, 10**7, 1.5, "x", [], [1], [[]], {"a": 1}, math.nan)
# Not in every file, but read where they are.
OPTIONAL = ("head_dim", "sliding_window", "q_lora_rank", "mlp_only_layers", "num_key_value_heads")
NUM_LAYERS = 2


def outcome(config, runs):
    """Return the peaks of some layouts, or the reason why there are none."""
    try:
        shape = ModelShape.from_config(config)
        return [
            predict(shape, layout, run).peak_bytes
            for run in runs
            for layout in legal_layouts(shape, run.world_size, run.entry_point)[:2]
        ]
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("model", ["mixtral-8x7b", "deepseek-v3", "qwen3-30b-a3b", "olmoe"])
def test_every_odd_value_gives_a_plan_or_a_sentence(model):
    config = {"model_type": "olmoe"} if model == "olmoe" else read_model(model)
    config |= {"num_hidden_layers": NUM_LAYERS}
    runs = [
        build_scenario("--use_lora all").planned_run(),
        build_scenario("", entry_point="fsdp1").planned_run(),
    ]
    reasons = 0
    for name in (*config, *OPTIONAL):
        for value in ODD_VALUES:
            if name == "num_hidden_layers" and value == 10**7:
                continue  # no model with so many layers was ever built before it is planned
            found = outcome(config | {name: value}, runs)
            assert found, (name, value)
            reasons += isinstance(found, str)
    assert reasons > len(OPTIONAL)


def test_an_unknown_family_is_a_reason():
    assert outcome({"model_type": "new_moe"}, []).startswith("model_type is 'new_moe' in the ")
    assert outcome({"model_type": ["mixtral"]}, []).startswith("model_type is ['mixtral'] in the ")
