"""The runs of the trackers that a training run reports to: one each, also over several processes.

The ids of the runs are kept in the output folder: a run that resumes there continues them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from rich.console import Console
from transformers.integrations.integration_utils import rewrite_logs

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.config.secrets import redact_record
from megablocks_utils.errors import ConfigurationError, UserError
from megablocks_utils.files import TRACKER_RUNS_NAME, finite_or_none, write_json_atomically
from megablocks_utils.training.report.metrics import StepMetrics
from megablocks_utils.training.report.trackers import (
    STOPPED,
    TRACKERS,
    TrackerRun,
    tracked_values,
)

__all__ = ["TrackerRuns", "flatten_config"]

_SAMPLES = "samples"
_NOT_IN_NAMES = re.compile(r"[^\w. :/-]", re.ASCII)
"""What MLflow, the strictest, takes in no name."""


class TrackerRuns:
    """Send a run's numbers to its trackers. Rank 0 only; without `names` nothing is sent.

    A tracker that fails while the run trains is left out from then on, with a warning: the numbers
    are in `metrics.jsonl`.

    Args:
        names: of the trackers.
        console: for warnings.
    """

    def __init__(self, names: Sequence[str], console: Console) -> None:
        self._names = tuple(names)
        self._console = console
        self._open: dict[str, GeneralTracker] = {}
        self._last_steps: dict[str, dict[str, int]] = {}

    def start(
        self,
        folder: str | Path,
        config: Mapping[str, Any],
        *,
        run_name: str | None,
        project: str | None,
        first_step: int,
    ) -> None:
        """Begin a run in each tracker, or continue the one that the output folder names.

        Args:
            folder: the output folder.
            config: what the tracker shows of the run, flat.
            run_name: for people; None: the folder's.
            project: see `TrackerRun`.
            first_step: steps done before; 0 begins new runs.

        Raises:
            ConfigurationError: for a tracker that cannot start, with its reason.
        """
        if not self._names:
            return
        folder = Path(folder)
        path = folder / TRACKER_RUNS_NAME
        ids = _read_ids(path) if first_step else {}
        name = run_name or folder.resolve().name
        for tracker in self._names:
            run = TrackerRun(name, project, ids.get(tracker), folder, first_step)
            if first_step and run.run_id is None:
                self._say(f"{path.name} names no run of {tracker}, where a new one begins")
            with ForeignCode(partial(_cannot_start, tracker, run.run_id, path)):
                self._start_one(tracker, run, config)
                ids[tracker] = TRACKERS[tracker].read_id(self._open[tracker])
        write_json_atomically(path, ids)

    def log_step(self, metrics: StepMetrics) -> None:
        """Send the numbers of a step."""
        self._log(metrics.step, rewrite_logs(tracked_values(metrics)))

    def log_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of an evaluation after `step`, named `eval_...`."""
        self._log(step, rewrite_logs({name: values[name] for name in values if name != "step"}))

    def log_samples(self, step: int, text: str) -> None:
        """Send the answers to held-out prompts after `step`, as a table in Markdown."""
        for name in tuple(self._open):
            self._try(name, partial(self._log_text, name, step, text))

    def log_summary(self, step: int, values: Mapping[str, float | None]) -> None:
        """Send what a run has come to, after its last step."""
        self._log(step, {f"summary/{name}": v for name, v in values.items() if v is not None})

    def finish(self, status: str = STOPPED) -> None:
        """End the runs.

        Args:
            status: `FINISHED`, `STOPPED` (it may be continued) or `FAILED`.
        """
        for name in tuple(self._open):
            self._try(name, partial(TRACKERS[name].end, self._open[name], status))
        self._open.clear()

    def _start_one(self, name: str, run: TrackerRun, config: Mapping[str, Any]) -> None:
        known = TRACKERS[name]
        tracker = LOGGER_TYPE_TO_CLASS[name](**known.arguments(run))
        tracker.start()
        self._open[name] = tracker
        self._last_steps[name] = known.read_last_steps(tracker) if run.run_id else {}
        if run.run_id is None or not known.has_one_config:
            known.store_config(tracker, dict(config))

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        for name in tuple(self._open):
            self._try(name, partial(self._log_one, name, step, dict(values)))

    def _log_one(self, name: str, step: int, values: dict[str, Any]) -> None:
        tracker, read_step = self._open[name], TRACKERS[name].read_step
        # What was done before the run was stopped is done again, to the same end.
        last = self._last_steps[name]
        fresh = {key: value for key, value in values.items() if step > last.get(key, -1)}
        if fresh and (read_step is None or step >= read_step(tracker)):
            tracker.log(fresh, step=step)

    def _log_text(self, name: str, step: int, text: str) -> None:
        tracker, read_step = self._open[name], TRACKERS[name].read_step
        if read_step is None or step >= read_step(tracker):
            TRACKERS[name].log_text(tracker, _SAMPLES, text, step)

    def _try(self, name: str, action: partial[None]) -> None:
        try:
            with ForeignCode(UserError):
                action()
        except UserError as error:
            self._open.pop(name, None)
            self._say(f"warning: {name} gets nothing more of this run, since it failed: {error}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


def flatten_config(
    sections: Mapping[str, Any], secrets: Sequence[str], prefix: str = ""
) -> dict[str, Any]:
    """Return a configuration as trackers take it: flat, of plain values, and without secrets.

    Args:
        sections: values, and sections of values, by name; a value keeps its own name alone.
        secrets: texts to look for.
        prefix: of every name.
    """
    flat: dict[str, Any] = {}
    for name, value in redact_record(dict(sections), secrets).items():
        key = _NOT_IN_NAMES.sub("_", prefix + name)
        if isinstance(value, Mapping):
            flat |= flatten_config(value, secrets, prefix)
        elif value is None or isinstance(value, bool | int | float | str):
            flat[key] = finite_or_none(value)
        else:
            flat[key] = ", ".join(map(str, value))
    return flat


def _read_ids(path: Path) -> dict[str, str]:
    """Return the ids of runs by tracker; none where the file is not ours."""
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(ids, dict):
        return {}
    return {name: value for name, value in ids.items() if isinstance(value, str)}


def _cannot_start(name: str, run_id: str | None, path: Path, reason: str) -> UserError:
    seen = f"report_to is {name}, but it cannot start: {reason.rstrip('.')}"
    if run_id is not None:
        seen += f" (continuing its run {run_id}; without {path} it begins a new one)"
    return ConfigurationError(f"{seen}.", parameters=("report_to",))
