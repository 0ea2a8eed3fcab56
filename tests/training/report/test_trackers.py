"""Trackers get the same numbers under the same names from both scripts."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_accelerate_fsdp2
import train_fsdp1
from megablocks_utils.config import OPTIONS
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.training.report import trackers
from megablocks_utils.training.report.metrics import read_metrics
from tests.support.argv import keep_last
from tests.support.parity import Layout, ParityCase, ParityFolder

SCRIPTS = {"fsdp2": train_accelerate_fsdp2.main, "fsdp1": train_fsdp1.main}


def test_every_tracker_that_can_be_chosen_is_known():
    (option,) = [option for option in OPTIONS if option.name == "report_to"]
    assert {*trackers.PACKAGES} == {*option.choices} - {"none"}


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    trackers.check_trackers(["tensorboard"])
    monkeypatch.setitem(trackers.PACKAGES, "tensorboard", "no_such_package")
    with pytest.raises(ConfigurationError) as caught:
        trackers.check_trackers(["tensorboard"])
    assert caught.value.as_options() == (
        "--report_to is tensorboard, but the package no_such_package is not installed; install it "
        "with: pip install no_such_package"
    )


def _train(rank: int, script: str, argv: list[str]) -> None:
    SCRIPTS[script](keep_last(argv))


def _read_events(folder: Path) -> dict[str, dict[int, float]]:
    """Return {tag: {step: value}} of the one event file below a folder."""
    (path,) = folder.rglob("events.out.tfevents*")
    events = EventAccumulator(str(path))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def test_both_scripts_log_the_same_tags_steps_and_losses(ranks2, tmp_path):
    """Every second step of four, as `metrics.jsonl` has them."""
    folder = ParityFolder(tmp_path)
    case = ParityCase(Layout(2, 2, "replicate"), "mixtral", num_steps=4)
    events = {}
    for script in SCRIPTS:
        words = ["--output_dir", str(tmp_path / script), "--logging_steps", "2"]
        argv = [*folder.argv(case), *words, "--report_to", "tensorboard"]
        ranks2.run(_train, script, argv, timeout=240)
        events[script] = _read_events(tmp_path / script / "runs")
        metrics = read_metrics(tmp_path / script / "metrics.jsonl")
        wanted = {step.step: pytest.approx(step.loss) for step in metrics[1::2]}
        assert events[script]["train/loss"] == wanted
    fsdp1, fsdp2 = events["fsdp1"], events["fsdp2"]
    assert {"train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_s"} <= {
        *fsdp1
    }
    assert {tag: [*values] for tag, values in fsdp1.items()} == {
        tag: [*values] for tag, values in fsdp2.items()
    }
