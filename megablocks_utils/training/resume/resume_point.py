"""Find the checkpoint that a run resumes from, and check that none of its files is damaged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megablocks_utils.checkpoint.manifest import check_files, read_manifest
from megablocks_utils.config import RunConfig
from megablocks_utils.files import METRICS_NAME
from megablocks_utils.processes.agreement import broadcast_from_rank0, raise_on_all_ranks
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.processes.output_folder import choose_checkpoint
from megablocks_utils.training.resume.random_states import restore_random_states
from megablocks_utils.training.resume.resume_compatibility import changed_options
from megablocks_utils.training.resume.run_state import RunState

__all__ = ["ResumePoint", "find_resume_point", "rank_file_name", "restore_run"]


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
    def metrics_path(self) -> Path:
        """The metrics of the steps done."""
        return self.folder / METRICS_NAME

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
        if changed := changed_options(before["options"], options):
            parts.append(f"changed: {', '.join(changed)}")
        return "; ".join(parts)

    def restore_random_states(self, launch: LaunchEnvironment) -> None:
        """Restore this rank's random states, if as many ranks have written the checkpoint.

        On another number of ranks they stay those of the seed; only dropout draws any.
        """
        if self.manifest["world_size"] == launch.world_size:
            restore_random_states((self.folder / rank_file_name(launch.rank)).read_bytes())


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
    manifest = raise_on_all_ranks(lambda: read_manifest(folder))
    files = manifest["files"]
    mine = sorted(files)[launch.rank :: launch.world_size]
    raise_on_all_ranks(lambda: check_files(folder, files, mine))
    return ResumePoint(folder, manifest)


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
    point.restore_random_states(launch)
