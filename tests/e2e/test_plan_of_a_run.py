"""A run is planned: refused where it cannot fit, compared with what it needed, never in its way."""

import json
from pathlib import Path
from unittest import mock

import pytest

import train_accelerate_fsdp2
from megablocks_utils.errors import ConfigurationError, PlanError
from megablocks_utils.training import memory_check
from megablocks_utils.training.memory_check import MemoryCheck
from tests.support.argv import keep_last
from tests.support.tiny_models import save_tiny_model

LENGTHS = (9, 5, 30, 7)
BYTES_OF_A_FULL_MACHINE = 20_000
"""A rank's half of it does not hold the tiny model's 100 kB."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model and data of known lengths."""
    save_tiny_model("mixtral", tmp_path / "model", sharded=False)
    rows = [{"input_ids": [3] * n, "labels": [3] * n} for n in LENGTHS]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def run_without_memory(rank: int, folder: Path, *more: str) -> str:
    """Train one step on a machine that has hardly any memory left."""
    with mock.patch.object(memory_check, "read_available_memory", lambda: BYTES_OF_A_FULL_MACHINE):
        return run(rank, folder, *more)


def run(rank: int, folder: Path, *more: str) -> str:
    """Train one step; returns what was refused."""
    options = {
        "model_name_or_path": folder / "model",
        "data_path": folder / "data.jsonl",
        "output_dir": folder / "out",
        "use_megablocks_sharding": True,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
    }
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    try:
        train_accelerate_fsdp2.main(keep_last([*argv, *more]))
    except PlanError as error:
        assert error.exit_code == 3
        return str(error)
    return ""


def test_what_cannot_fit_is_refused_and_nothing_is_written(ranks2, folder):
    refusals = ranks2.run(run_without_memory, folder)
    assert refusals[0] == refusals[1]
    assert refusals[0].startswith("the plan's peak is ")
    assert refusals[0].endswith("--ignore_plan True starts all the same.")
    assert not (folder / "out").exists()


def test_it_can_be_ignored(ranks2, folder):
    more = ("--ignore_plan", "True")
    assert ranks2.run(run_without_memory, folder, *more) == ["", ""]
    assert json.loads((folder / "out" / "run.json").read_text())["plan"]["verdict"] == "oom"


def test_the_record_holds_plan_and_measurement(ranks2, folder):
    assert ranks2.run(run, folder) == ["", ""]
    plan = json.loads((folder / "out" / "run.json").read_text())["plan"]
    predicted, measured = plan["predicted"]["components"], plan["measured"]["components"]
    assert plan["layout"] == {"ep_size": 2, "expert_dp": "shard"}
    assert measured["parameters"] == predicted["parameters"]
    # A step counter of 4 bytes for each parameter is left out of what is measured.
    num_parameters = 2 * 9 + 3
    assert measured["optimizer"] == predicted["optimizer"] - 4 * num_parameters
    assert plan["verdict"] == "fits"
    assert plan["measured"]["kept_by_c_library_bytes"] >= 0


def run_unplanned(rank: int, folder: Path) -> str:
    """Train what the planner knows nothing of."""
    unknown = ConfigurationError("its family is new.")
    with mock.patch.object(memory_check, "plan_run", side_effect=unknown):
        return run(rank, folder)


def test_what_cannot_be_planned_is_trained(ranks2, folder):
    assert ranks2.run(run_unplanned, folder) == ["", ""]
    record = json.loads((folder / "out" / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["plan"]["not_planned"] == "its family is new."
    assert record["plan"]["measured"]["components"]["parameters"] > 0
    check = MemoryCheck(None, "its family is new.", "cpu", 0)
    assert check.describe() == "not planned: its family is new."
