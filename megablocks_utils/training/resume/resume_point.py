"""Find the checkpoint that a run resumes from, and check that none of its files is damaged."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from megablocks_utils.checkpoint.json_file import show_value
from megablocks_utils.checkpoint.manifest import check_files
from megablocks_utils.checkpoint.run_manifest import (
    BASE_KEY,
    COMPATIBILITY_KEY,
    DATE_KEY,
    STREAM_KEY,
    read_run_manifest,
)
from megablocks_utils.config import RunConfig
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import EXPERT_LOAD_NAME, METRICS_NAME, SAMPLES_NAME
from megablocks_utils.processes.agreement import broadcast_from_rank0, raise_on_all_ranks
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.processes.output_folder import choose_checkpoint
from megablocks_utils.training.report.evaluations import read_evaluations
from megablocks_utils.training.report.expert_load import read_loads
from megablocks_utils.training.report.metrics import read_metrics
from megablocks_utils.training.resume.random_states import restore_random_states
from megablocks_utils.training.resume.resume_compatibility import changed_options
from megablocks_utils.training.resume.run_state import RunState

__all__ = [
    "ResumePoint",
    "choose_template_date",
    "find_resume_point",
    "rank_file_name",
    "restore_run",
]


@dataclass(frozen=True)
class ResumePoint:
    """Hold a checkpoint whose files have been checked.

    Attributes:
        folder: of the checkpoint.
        manifest: what it says of itself.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest["step"]

    @property
    def template_date(self) -> date | None:
        """The day that its chat template was told; None where none was."""
        day = self.manifest[COMPATIBILITY_KEY].get(DATE_KEY)
        return None if day is None else date.fromisoformat(day)

    @property
    def stream_position(self) -> dict[str, int] | None:
        """How far data that is read while training was read; None for other data."""
        return self.manifest.get(STREAM_KEY)

    @property
    def metrics_path(self) -> Path:
        """The metrics of the steps done."""
        return self.folder / METRICS_NAME

    @property
    def loads_path(self) -> Path | None:
        """The loads of experts in the steps done; None where none were measured."""
        path = self.folder / EXPERT_LOAD_NAME
        return path if path.name in self.manifest["files"] else None

    @property
    def samples_path(self) -> Path | None:
        """The answers to held-out prompts so far; None where none were asked for."""
        path = self.folder / SAMPLES_NAME
        return path if path.name in self.manifest["files"] else None

    def describe(self, options: Mapping[str, Any]) -> str:
        """Describe the checkpoint and the options that have changed since.

        Args:
            options: of this run, by section.
        """
        before = self.manifest
        axes = " x ".join(f"{axis} {size}" for axis, size in before["mesh"].items())
        processes = (
            "1 process" if before["world_size"] == 1 else f"{before['world_size']} processes"
        )
        parts = [f"{self.folder}, after step {self.step}, written by {processes} ({axes})"]
        facts = before[COMPATIBILITY_KEY]
        if facts["lora"] is not None and BASE_KEY not in facts:
            parts.append("it names no fingerprint of its base model, which is not compared")
        if changed := changed_options(before["options"], options):
            parts.append(f"changed: {', '.join(changed)}")
        return "; ".join(parts)

    def restore_random_states(self, launch: LaunchEnvironment) -> None:
        """Restore this rank's random states, if as many ranks have written the checkpoint.

        On another number of ranks they stay those of the seed; only dropout draws any.

        Raises:
            CheckpointError: there are none of this rank, or they cannot be used.
        """
        if self.manifest["world_size"] != launch.world_size:
            return
        path = self.folder / rank_file_name(launch.rank)
        if path.name not in self.manifest["files"]:
            raise CheckpointError(f"the checkpoint {self.folder} lacks its file {path.name}")
        restore_random_states(path.read_bytes(), path)


def find_resume_point(config: RunConfig, launch: LaunchEnvironment) -> ResumePoint | None:
    """Return what the run resumes from; None for one that starts fresh.

    Rank 0 chooses. Each rank checks the checksums of some of the files.

    **Collective:** every rank must call.

    Raises:
        ConfigurationError: as `choose_checkpoint`.
        CheckpointError: on every rank, for a file that is missing, truncated or altered.
    """
    folder = broadcast_from_rank0(lambda: choose_checkpoint(config))
    if folder is None:
        return None
    manifest = raise_on_all_ranks(lambda: read_run_manifest(folder))
    files = manifest["files"]
    mine = sorted(files)[launch.rank :: launch.world_size]
    raise_on_all_ranks(lambda: check_files(folder, files, mine))
    point = ResumePoint(folder, manifest)
    broadcast_from_rank0(lambda: _check_metrics(point))
    broadcast_from_rank0(lambda: _check_loads(point))
    return point


def choose_template_date(resume: ResumePoint | None) -> date:
    """Return the day that chat templates are told: that of the run's start, also when it resumes.

    **Collective:** every rank must call.
    """
    day = None if resume is None else resume.template_date
    return day or broadcast_from_rank0(date.today)


def _check_metrics(point: ResumePoint) -> None:
    """Refuse metrics that are not those of the steps done.

    Raises:
        CheckpointError: a line that is not the metrics of a step, or a step too many or too few.
    """
    path = point.metrics_path
    try:
        lines, evaluations = read_metrics(path), read_evaluations(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} holds a line that is no metrics: {reason}") from error
    for record in [*(line.as_record() for line in lines), *(e.as_record() for e in evaluations)]:
        for name, value in record.items():
            if not isinstance(value, int | float | None) or isinstance(value, bool):
                raise CheckpointError(
                    f"{path} has {name} {show_value(value)} in a line, wanted is a number"
                )
    if len(lines) != point.step or any(line.step != n for n, line in enumerate(lines, start=1)):
        raise CheckpointError(f"{path} does not hold each of the {point.step} steps done once")
    steps = [evaluation.step for evaluation in evaluations]
    if steps != sorted(set(steps)) or any(not 0 <= step <= point.step for step in steps):
        raise CheckpointError(
            f"{path} does not hold evaluations of the {point.step} steps done, each once"
        )


def _check_loads(point: ResumePoint) -> None:
    """Refuse loads that are not those of some of the steps done, in their order.

    Raises:
        CheckpointError: a line that is not the load of a layer, or of another step.
    """
    path = point.loads_path
    if path is None:
        return
    try:
        steps = [loads.step for loads in read_loads(path)]
        is_whole = all(0 < step <= point.step for step in steps) and steps == sorted(set(steps))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} holds a line that is no expert load: {reason}") from error
    if not is_whole:
        raise CheckpointError(
            f"{path} does not hold loads of the {point.step} steps done, each step once"
        )


def rank_file_name(rank: int) -> str:
    """Return the name of the file with the random states of a rank."""
    return f"rng-{rank:05d}.json"


def restore_run(point: ResumePoint, state: RunState, launch: LaunchEnvironment) -> None:
    """Put weights, optimizer, schedule and random states back where the checkpoint has them.

    **Collective:** every rank must call.

    Raises:
        CheckpointError: on every rank, if the checkpoint does not fit the run.
    """
    raise_on_all_ranks(lambda: state.restore(point.folder, point.step))
    raise_on_all_ranks(lambda: point.restore_random_states(launch))
