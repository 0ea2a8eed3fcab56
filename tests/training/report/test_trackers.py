"""Trackers get the same numbers under the same names from both scripts."""

import json
from dataclasses import replace
from pathlib import Path

import accelerate.tracking
import pytest
from accelerate import PartialState
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_accelerate_fsdp2
import train_fsdp1
from megablocks_utils.config import OPTIONS
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.training.report import tracker_runs, trackers
from megablocks_utils.training.report.metrics import read_metrics
from megablocks_utils.training.report.samples import Sample, format_samples
from tests.support.argv import keep_last
from tests.support.parity import Layout, ParityCase, ParityFolder

SCRIPTS = {"fsdp2": train_accelerate_fsdp2.main, "fsdp1": train_fsdp1.main}


def test_every_tracker_that_can_be_chosen_is_known():
    (option,) = [option for option in OPTIONS if option.name == "report_to"]
    assert {*trackers.TRACKERS} == {*option.choices} - {"none"}
    assert {*trackers.TRACKERS} <= {*accelerate.tracking.LOGGER_TYPE_TO_CLASS}


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    trackers.check_trackers(["tensorboard"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError) as caught:
        trackers.check_trackers(["wandb"])
    assert caught.value.as_options() == (
        "--report_to is wandb, but the package wandb is not installed; install it "
        "with: pip install wandb"
    )


class FakeMlflow:
    """Record what Accelerate's tracker is told; it fails in step 7."""

    runs: dict[str, list] = {}

    def __init__(self, experiment_name, run_name, run_id):
        self.run_id = run_id or f"{experiment_name}/{run_name}#{len(self.runs)}"
        self.tracker = type("Run", (), {"info": type("Info", (), {"run_id": self.run_id})})
        self.told = self.runs.setdefault(self.run_id, [])

    def start(self):
        self.told.append("start")

    def store_init_configuration(self, values):
        self.told.append(values)

    def log(self, values, step):
        if step == 7:
            raise ConnectionError("no server")
        self.told.append((step, values))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(FakeMlflow, "runs", {})
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "mlflow", FakeMlflow)
    record = trackers.TRACKERS["mlflow"]
    ended = replace(
        record,
        end=lambda tracker, status: tracker.told.append(status),
        read_last_steps=lambda tracker: {"eval/loss": 2},
        log_text=lambda tracker, name, text, step: tracker.told.append((step, name, text)),
    )
    monkeypatch.setattr(tracker_runs, "TRACKERS", {"mlflow": ended})
    return FakeMlflow.runs


def _start(folder: Path, first_step: int = 0, **names: str | None) -> tracker_runs.TrackerRuns:
    runs = tracker_runs.TrackerRuns(["mlflow"], Console(stderr=True))
    names = {"run_name": None, "project": "p"} | names
    runs.start(folder, {"seed": 1}, first_step=first_step, **names)
    return runs


def test_a_run_that_resumes_in_its_folder_continues_its_tracker_run(fake, tmp_path):
    runs = _start(tmp_path)
    runs.log_evaluation(0, {"step": 0, "eval_loss": 2.5})
    runs.log_samples(0, "| a |")
    runs.finish()
    runs = _start(tmp_path, first_step=4)
    runs.log_evaluation(2, {"eval_loss": 2.5})  # which it has
    runs.log_summary(5, {"final_loss": 1.0, "best": None})
    runs.finish(trackers.FINISHED)
    told = ["start", {"seed": 1}, (0, {"eval/loss": 2.5}), (0, "samples", "| a |"), "KILLED"]
    told += ["start", (5, {"summary/final_loss": 1.0}), "FINISHED"]
    assert fake == {f"p/{tmp_path.name}#0": told}
    _start(tmp_path, run_name="fresh")
    assert [*fake][1:] == ["p/fresh#1"]  # a run that starts fresh has one of its own


def test_a_tracker_that_fails_is_left_out_and_training_continues(fake, tmp_path, capsys):
    runs = _start(tmp_path)
    runs.log_evaluation(7, {"eval_loss": 2.5})
    runs.log_evaluation(8, {"eval_loss": 2.5})
    assert fake == {f"p/{tmp_path.name}#0": ["start", {"seed": 1}]}
    warning = "warning: mlflow gets nothing more of this run, since it failed: no server"
    assert warning in capsys.readouterr().err


def test_a_tracker_that_cannot_continue_is_named_with_its_file(fake, tmp_path, monkeypatch):
    _start(tmp_path).finish()
    monkeypatch.setattr(FakeMlflow, "start", lambda self: 1 / 0)
    with pytest.raises(
        ConfigurationError, match="report_to is mlflow, but it cannot start: .*"
    ) as e:
        _start(tmp_path, first_step=1)
    assert f"without {tmp_path / 'trackers.json'} it begins a new one" in str(e.value)


def test_no_secret_reaches_a_tracker():
    secret, sections = "hf_" + "x" * 30, {"a": {"hub_token": "abc", "seed": 1}}
    sections |= {
        "data_path": ("a", "b"),
        "url": f"https://me:{secret}@host/x",
        "a, b": "s3cretword",
    }
    assert tracker_runs.flatten_config(sections, ["s3cretword"], "x/") == {
        "x/hub_token": "REDACTED",
        "x/seed": 1,
        "x/data_path": "a, b",
        "x/url": "https://REDACTED@host/x",
        "x/a_ b": "REDACTED",
    }


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_library_itself_keeps_one_run_without_secrets(name, tmp_path, monkeypatch):
    """Two processes' worth of one run, offline or in a local store, read back."""
    pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr("sys.argv", ["train.py", "--hub_token", "s3cretword"])
    PartialState(cpu=True)
    for first_step in (0, 1):  # stopped after step 2, and resumed from a checkpoint of step 1
        runs = tracker_runs.TrackerRuns([name], Console(stderr=True))
        runs.start(
            tmp_path, {"seed": 1}, run_name="r", project=tmp_path.name, first_step=first_step
        )
        for step in range(first_step + 1, first_step + 3):
            runs.log_evaluation(step, {"eval_loss": 1 / step})
            runs.log_samples(step, f"| answer {step} |")
        runs.finish(trackers.FINISHED if first_step else trackers.STOPPED)
    run_id = json.loads((tmp_path / "trackers.json").read_text())[name]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"s3cretword" in p.read_bytes()]
    if name == "wandb":
        folders = [*tmp_path.glob("wandb/offline-run-*")]
        assert len(folders) == 2 and all(f.name.endswith(run_id) for f in folders)
    elif name == "mlflow":
        import mlflow

        history = mlflow.MlflowClient().get_metric_history(run_id, "eval/loss")
        assert [(m.step, m.value) for m in history] == [(s, 1 / s) for s in (1, 2, 3)]
        assert mlflow.get_run(run_id).data.params == {"seed": "1"}
        files = {p.name: p.read_text() for p in tmp_path.rglob("samples/step-*.md")}
        assert files == {f"step-{s}.md": f"| answer {s} |" for s in (1, 2, 3)}
    else:
        import trackio

        (run,) = trackio.Api().runs(tmp_path.name)
        assert run.name == run_id and run_id.startswith("r-")


def test_answers_are_text_in_tensorboard(tmp_path):
    """A table of the answers of one evaluation; bars in a text do not end a cell."""
    PartialState(cpu=True)
    runs = tracker_runs.TrackerRuns(["tensorboard"], Console(stderr=True))
    runs.start(tmp_path, {"seed": 1}, run_name="r", project=None, first_step=0)
    runs.log_samples(4, format_samples([Sample(4, 1, "a|b\nc", "e", "f", "g")]))
    runs.finish()
    (path,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(path))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    (text,) = event.tensor_proto.string_val
    assert event.step == 4
    assert text.decode() == (
        "| prompt | expected | first answer | answer after step 4 |\n| --- | --- | --- | --- |\n"
        "| a\\|b c | e | f | g |\n"
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
