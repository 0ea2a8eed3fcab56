"""run.json says what ran, on what, with which result, and is complete or absent."""

import json
import platform
import shutil
import subprocess
from dataclasses import dataclass

import pytest
import torch

from megablocks_utils.training.report.memory import describe_memory_source
from megablocks_utils.training.report.metrics import RunTotals
from megablocks_utils.training.report.parameters import ParameterCounts
from megablocks_utils.training.report.run_record import (
    LIBRARIES,
    build_run_record,
    read_commit,
    write_run_json,
)


@dataclass(frozen=True)
class Section:
    learning_rate: float = 5e-5
    ep_size: int | None = None


@dataclass(frozen=True)
class Options:
    optim: Section = Section()
    report_to: tuple[str, ...] = ("tensorboard",)


def build_record(**changes):
    facts = {
        "resolved": {"ep_size": 4, "precision": {"name": "fp32"}},
        "mesh": {"dp": 2, "ep": 4},
        "kernel": "eager",
        "kernel_reason": "chosen by --kernel",
        "kernel_probe": {"worst": 1.5, "tensor": "output"},
        "parameters": ParameterCounts(total=100, active=60, trainable=7),
        "train_runtime_s": 12.5,
        "totals": RunTotals(3, 20, 50, 4000, 3000),
        "device": torch.device("cpu"),
        "plan": {"verdict": "fits"},
    }
    return build_run_record(
        ["train.py", "--data_path", "my data.json"], Options(), **facts | changes
    )


def test_keys_and_values(tmp_path):
    write_run_json(tmp_path / "run.json", build_record())
    run = json.loads((tmp_path / "run.json").read_text())
    assert list(run) == [
        "status",
        "command",
        "options",
        "resolved",
        "versions",
        "commit",
        "hardware",
        "provenance",
        "mesh",
        "kernel",
        "parameters",
        "train_runtime_s",
        "totals",
        "peaks",
        "adapter_check",
        "plan",
        "answer_end",
        "evaluation",
    ]
    assert run["status"] == "finished"
    shared = ("command", "commit", "versions", "hardware")
    assert {key: run["provenance"][key] for key in shared} == {key: run[key] for key in shared}
    assert set(run["provenance"]) - {*shared} == {"environment", "date"}
    assert run["command"] == "train.py --data_path 'my data.json'"
    assert run["options"] == {
        "optim": {"learning_rate": 5e-5, "ep_size": None},
        "report_to": ["tensorboard"],
    }
    assert run["resolved"] == {"ep_size": 4, "precision": {"name": "fp32"}}
    assert list(run["mesh"].items()) == [("dp", 2), ("ep", 4)]
    assert run["kernel"] == {
        "name": "eager",
        "reason": "chosen by --kernel",
        "probe": {"worst": 1.5, "tensor": "output"},
    }
    assert run["parameters"] == {
        "total": 100,
        "active": 60,
        "trainable": 7,
        "flops_per_token": None,
    }
    assert run["train_runtime_s"] == 12.5
    assert run["totals"] == {"steps": 3, "tokens": 20, "input_tokens": 50}
    assert run["plan"] == {"verdict": "fits"}
    assert run["peaks"] == {
        "mem_peak_bytes": 4000,
        "mem_alloc_bytes": 3000,
        "measured": describe_memory_source(torch.device("cpu")),
    }


def test_versions_and_hardware_are_this_machines():
    record = build_record()
    assert list(record.versions) == ["python", *LIBRARIES]
    assert record.versions["python"] == platform.python_version()
    assert record.versions["torch"] == torch.__version__
    assert sorted(record.hardware) == ["cores", "cpu", "gpus", "memory_bytes"]
    assert len(record.hardware["gpus"]) == torch.cuda.device_count()
    assert record.hardware["memory_bytes"] > 2**28
    assert record.hardware["cpu"] != ""


def test_a_failed_write_keeps_the_run_before(tmp_path):
    path = tmp_path / "run.json"
    write_run_json(path, build_record(train_runtime_s=1.0))
    with pytest.raises(TypeError):
        write_run_json(path, build_record(resolved={"dtype": torch.float32}))
    assert json.loads(path.read_text())["train_runtime_s"] == 1.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_commit_of_a_checkout_and_of_none(tmp_path):
    assert read_commit(tmp_path) is None
    (tmp_path / ".git").mkdir()  # looks like a checkout, but git does not know it
    assert read_commit(tmp_path) is None


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_is_the_one_checked_out(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True, timeout=20)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True, timeout=20)
    log = subprocess.run(
        [*git, "log", "--format=%H"], check=True, timeout=20, capture_output=True, text=True
    )
    assert read_commit(tmp_path) == log.stdout.strip()
    assert read_commit(tmp_path / "elsewhere") is None
