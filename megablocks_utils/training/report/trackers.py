"""Trackers: what each one needs, and how its run is begun, continued and ended.

Both scripts send to Accelerate's trackers, so that names and steps are the same. To add one, give
it a record here and a name in the choices of `--report_to`.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.files import TRACKERS_FOLDER_NAME
from megablocks_utils.training.report.metrics import StepMetrics

__all__ = ["FAILED", "FINISHED", "STOPPED", "TRACKERS", "Tracker", "TrackerRun"]
__all__ += ["check_trackers", "tracked_values"]

PROJECT_NAME = "megablocks_utils"
FINISHED, STOPPED, FAILED = "FINISHED", "KILLED", "FAILED"
"""How a run has ended, in MLflow's words."""


@dataclass(frozen=True)
class TrackerRun:
    """Say which run of a tracker the steps go to.

    Attributes:
        name: for people.
        project: what the tracker groups runs by; None: as its environment says, or ours.
        run_id: of the run to continue; None for a new one.
        folder: output folder, for trackers that write into it.
        first_step: optimizer steps done before.
    """

    name: str
    project: str | None
    run_id: str | None
    folder: Path
    first_step: int = 0


@dataclass(frozen=True)
class Tracker:
    """Describe one tracker; the objects that it is asked about are Accelerate's.

    Attributes:
        package: what must be installed.
        arguments: of the class that Accelerate has for it.
        read_id: returns what a later process continues the run by.
        store_config: keeps the configuration of a run; by default in Accelerate's way.
        end: ends the run as finished, stopped or failed.
        has_one_config: whether what is stored once can never change.
        log_text: keeps a text of a step under a name; by default in Accelerate's way.
        read_step: returns its last step, where it takes none below that; None: it takes any.
        read_last_steps: returns the last step of each number that it has, where a number that is
            sent again would be doubled.
    """

    package: str
    arguments: Callable[[TrackerRun], Mapping[str, Any]]
    read_id: Callable[[Any], str]
    store_config: Callable[[Any, dict[str, Any]], None] = lambda t, c: t.store_init_configuration(c)
    end: Callable[[Any, str], None] = lambda tracker, _status: tracker.finish()
    has_one_config: bool = False
    log_text: Callable[[Any, str, str, int], None] = lambda tracker, name, text, step: tracker.log(
        {name: text}, step=step
    )
    read_step: Callable[[Any], int] | None = None
    read_last_steps: Callable[[Any], dict[str, int]] = lambda _tracker: {}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed; Accelerate would leave it out silently.

    Raises:
        ConfigurationError: naming the line that installs it.
    """
    for name in names:
        package = TRACKERS[name].package
        if find_spec(package) is None:
            raise ConfigurationError(
                f"report_to is {name}, but the package {package} is not installed; install it "
                f"with: pip install {package}",
                parameters=("report_to",),
            )


def tracked_values(metrics: StepMetrics) -> dict[str, float]:
    """Return the numbers of a step that trackers show, by their names in `metrics.jsonl`."""
    record = metrics.as_record()
    del record["step"]  # every tracker has it beside the values
    return {name: value for name, value in record.items() if value is not None}


def _tensorboard_arguments(run: TrackerRun) -> dict[str, Any]:
    folder = run.folder / TRACKERS_FOLDER_NAME
    name, number = run.project or PROJECT_NAME, 1
    while run.run_id is None and (folder / name).exists():  # of a run that this one overwrites
        number += 1
        name = f"{run.project or PROJECT_NAME}-{number}"
    return {
        "run_name": run.run_id or name,
        "logging_dir": str(folder),
        "purge_step": run.first_step + 1 if run.run_id else None,
    }


def _store_as_text(tracker: Any, values: dict[str, Any]) -> None:
    """Keep a configuration as text: as hyperparameters it would be another run."""
    text = json.dumps(values, indent=2)
    tracker.tracker.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))


def _wandb_arguments(run: TrackerRun) -> dict[str, Any]:
    import wandb

    # What it collects of the process holds the command line and the address of the repository.
    settings = wandb.Settings(
        x_disable_meta=True, disable_git=True, console=os.environ.get("WANDB_CONSOLE", "off")
    )
    own = {} if run.run_id is None else {"id": run.run_id, "resume": "allow"}
    project = run.project or os.environ.get("WANDB_PROJECT") or PROJECT_NAME
    return {"run_name": project, "name": run.name, "settings": settings} | own


def _end_wandb(tracker: Any, status: str) -> None:
    tracker.tracker.finish(exit_code=0 if status == FINISHED else 1)


def _mlflow_arguments(run: TrackerRun) -> dict[str, Any]:
    experiment = run.project or PROJECT_NAME
    return {"experiment_name": experiment, "run_name": run.name, "run_id": run.run_id}


def _end_mlflow(_tracker: Any, status: str) -> None:
    import mlflow

    mlflow.end_run(status)


def _read_last_mlflow_steps(tracker: Any) -> dict[str, int]:
    import mlflow

    client, run_id = mlflow.MlflowClient(), tracker.tracker.info.run_id
    names = client.get_run(run_id).data.metrics
    return {n: max(m.step for m in client.get_metric_history(run_id, n)) for n in names}


def _log_mlflow_text(tracker: Any, name: str, text: str, step: int) -> None:
    """Keep a text as a file: its metrics are numbers alone."""
    import mlflow

    run_id = tracker.tracker.info.run_id
    mlflow.MlflowClient().log_text(run_id, text, f"{name}/step-{step}.md")


def _trackio_arguments(run: TrackerRun) -> dict[str, Any]:
    """Return what it takes; a run is known by its name alone, which must be its own."""
    name = run.run_id or f"{run.name}-{os.urandom(3).hex()}"
    return {"run_name": run.project or PROJECT_NAME, "name": name, "resume": "allow"}


TRACKERS: Mapping[str, Tracker] = MappingProxyType(
    {
        "tensorboard": Tracker(
            package="tensorboard",
            arguments=_tensorboard_arguments,
            read_id=lambda tracker: str(tracker.run_name),
            store_config=_store_as_text,
        ),
        "wandb": Tracker(
            package="wandb",
            arguments=_wandb_arguments,
            read_id=lambda tracker: str(tracker.tracker.id),
            end=_end_wandb,
            read_step=lambda tracker: int(tracker.tracker.step),
        ),
        "mlflow": Tracker(
            package="mlflow",
            arguments=_mlflow_arguments,
            read_id=lambda tracker: str(tracker.tracker.info.run_id),
            end=_end_mlflow,
            read_last_steps=_read_last_mlflow_steps,
            log_text=_log_mlflow_text,
            has_one_config=True,
        ),
        "trackio": Tracker(
            package="trackio",
            arguments=_trackio_arguments,
            read_id=lambda tracker: str(tracker.tracker.name),
        ),
    }
)
"""By the name that `--report_to` and Accelerate have for it."""
