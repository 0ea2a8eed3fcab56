"""The plan of a run that starts: one line, one record, and when it is refused."""

import json
from dataclasses import replace

import pytest

from megablocks_utils.config import parse_args
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.memory import scenario as scenario_module
from megablocks_utils.planning.memory.run_plan import plan_run
from megablocks_utils.planning.memory.scenario import read_shape
from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.prediction import COMPONENTS, ParallelLayout
from megablocks_utils.planning.report.prediction_check import read_run_plan
from tests.planning.cases import build_prediction, read_model

GB = 10**9
MIXTRAL = ModelShape.from_config(read_model("mixtral-8x7b"))


@pytest.fixture
def known(monkeypatch):
    """Hold 80 GB of states, copies 160, and what the tokens ask for; remember what was asked."""
    asked = []

    def predict(shape, layout, run):
        asked.append((shape.num_layers, layout, run))
        held = (160 if layout.expert_dp == "replicate" else 80) * GB
        parts = {"activations": run.tokens * 10**6, "dispatch_buffers": run.label_tokens}
        return build_prediction(optimizer=held, allocated_bytes=9, **parts)

    monkeypatch.setattr(scenario_module, "predict", predict)
    return asked


def plan(line, **options):
    options = {
        "world_size": 4,
        "device_type": "cuda",
        "capacity_bytes": 100 * GB,
        "tokens": 1000,
        "label_tokens": 600,
        "examples": 3,
        "packing": "padded",
        "kernel": "triton",
    } | options
    config = parse_args(line.split(), entry_point="fsdp2")
    shape = options.pop("shape", None) or read_shape(config, read_model("mixtral-8x7b"))
    return plan_run(config, shape, **options)


COPIES = "--use_megablocks_sharding True --ep_size 2 --expert_dp replicate"


def test_exactly_this_run_is_predicted(known):
    plan(f"{COPIES} --truncate_model_for_debug True --precision bf16", device_type="cpu")
    layers, layout, run = known[0]
    assert (layers, layout, len(known)) == (2, ParallelLayout(2, "replicate"), 1)
    assert (run.world_size, run.device_type, run.kernel) == (4, "cpu", "triton")
    assert (run.tokens, run.label_tokens, run.examples) == (1000, 600, 3)
    assert run.row_tokens == 334
    assert run.precision.name == "bf16"


def test_one_line_and_the_record(known, tmp_path):
    found = plan("--use_megablocks_sharding True")
    assert found.describe() == (
        "peak 81.0 GB in the backward (80.0 GB optimizer states) of 100.0 GB: fits"
    )
    record = found.as_record()
    assert list(record["predicted"]["components"]) == list(COMPONENTS)
    assert record["predicted"]["peak_bytes"] == 81 * GB + 600
    assert record["predicted"]["allocated_bytes"] == 9
    assert (record["capacity_bytes"], record["verdict"]) == (100 * GB, "fits")
    assert record["predicted"]["moment"] == "backward"
    assert not found.is_impossible


def test_what_check_reads_is_what_a_run_writes(known, tmp_path):
    record = plan("").as_record() | {"measured": {"components": {}, "peak_bytes": 1}}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"plan": record}))
    assert read_run_plan(path) == record


@pytest.mark.parametrize(("capacity_gb", "impossible"), [(80, True), (82, False)])
def test_only_tensors_that_do_not_fit_are_impossible(known, capacity_gb, impossible):
    """82 GB do not hold 81 and the context: a verdict of oom, but the reserve is an estimate."""
    found = plan("--use_megablocks_sharding True", capacity_bytes=capacity_gb * GB)
    assert found.verdict.name == "oom"
    assert found.is_impossible is impossible


def test_the_refusal_names_the_way_out(known):
    found = plan(COPIES)
    assert found.is_impossible
    assert found.describe_impossible() == (
        "the plan's peak is 161.0 GB a rank (160.0 GB optimizer states), but a device has 100.0 "
        "GB; --expert_dp shard: 81.0 GB would fit; --ignore_plan True starts all the same."
    )


def test_no_help_is_claimed_where_there_is_none(known):
    found = plan("--use_megablocks_sharding True", capacity_bytes=10 * GB)
    assert found.describe_impossible() == (
        "the plan's peak is 81.0 GB a rank (80.0 GB optimizer states), but a device has 10.0 GB; "
        "--ignore_plan True starts all the same."
    )


def test_more_ranks_are_no_help_to_a_run_that_starts(monkeypatch):
    """What only other numbers of ranks change is not offered: they are no option of a run."""

    def predict(shape, layout, run):
        return build_prediction(optimizer=400 * GB // run.world_size)

    monkeypatch.setattr(scenario_module, "predict", predict)
    found = plan("", capacity_bytes=60 * GB)
    assert found.is_impossible
    assert "would fit" not in found.describe_impossible()


def test_what_the_formulas_do_not_know_is_not_planned(known):
    with pytest.raises(ConfigurationError, match=r"^the formulas do not know the mixer with "):
        plan("", shape=replace(MIXTRAL, not_known="the mixer with A_log"))
    assert known == []
