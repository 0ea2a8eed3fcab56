"""What a run tells its trackers, from its first step to its end."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megablocks_utils.config.secrets import find_secrets
from megablocks_utils.processes.agreement import raise_on_all_ranks
from megablocks_utils.training.report.metrics import StepMetrics
from megablocks_utils.training.report.run_record import RunRecord, build_provenance
from megablocks_utils.training.report.samples import Sample, format_samples
from megablocks_utils.training.report.tracker_runs import TrackerRuns, flatten_config
from megablocks_utils.training.report.trackers import FAILED, FINISHED, STOPPED
from megablocks_utils.training.setup import Setup
from megablocks_utils.training.start_facts import describe_resolved

__all__ = ["Tracking"]


class Tracking:
    """Report a run to its trackers, from rank 0; on the other ranks nothing is reported.

    Args:
        setup: the run.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        names = setup.config.report_to if setup.launch.rank == 0 else ()
        self._runs = TrackerRuns(names, setup.console)
        self._is_finished = False

    def start(self) -> None:
        """Begin the trackers' runs, or continue them.

        **Collective:** every rank must call; all raise what rank 0 raises.
        """
        config = self._setup.config
        if config.report_to:
            raise_on_all_ranks(self._start)

    def _start(self) -> None:
        config = self._setup.config
        self._runs.start(
            config.output_dir,
            describe_for_trackers(self._setup),
            run_name=config.run_name,
            project=config.project,
            first_step=self._setup.first_step,
        )

    def record(self, metrics: StepMetrics) -> None:
        """Report a step, if it is one of `logging_steps`."""
        if metrics.step % self._setup.config.logging_steps == 0:
            self._runs.log_step(metrics)

    def record_evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Report an evaluation after `step`: its line in `metrics.jsonl`."""
        self._runs.log_evaluation(step, values)

    def record_samples(self, samples: Sequence[Sample]) -> None:
        """Report the answers to held-out prompts of one evaluation."""
        if samples:
            self._runs.log_samples(samples[0].step, format_samples(samples))

    def finish(self, record: RunRecord, *, first_loss: float, final_loss: float) -> None:
        """Report what the run has come to."""
        values = record.totals | record.peaks | {"train_runtime_s": record.train_runtime_s}
        numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
        losses = {"first_loss": first_loss, "final_loss": final_loss}
        self._runs.log_summary(record.totals["steps"], numbers | losses)
        self._is_finished = True

    def close(self, error: BaseException | None) -> None:
        """End the trackers' runs: finished, to be continued, or failed."""
        stopped = FINISHED if self._is_finished else STOPPED
        self._runs.finish(stopped if error is None else FAILED)


def describe_for_trackers(setup: Setup) -> dict[str, Any]:
    """Return what trackers show of a run: options, what they have come to, and on what it runs."""
    provenance = build_provenance(sys.argv)
    facts = {
        "resolved": describe_resolved(setup),
        "mesh": setup.placement.axis_sizes,
        "parameters": asdict(setup.counts),
        "provenance": {name: provenance[name] for name in ("command", "commit", "date")},
        "versions": provenance["versions"],
        "hardware": provenance["hardware"],
    }
    secrets = find_secrets(sys.argv)
    config = flatten_config(asdict(setup.config), secrets)
    for section, values in facts.items():
        config |= flatten_config(values, secrets, f"{section}/")
    return config
