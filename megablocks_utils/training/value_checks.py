"""Where a run looks for values that are not finite: in steps, and before it saves or resumes.

Those of a model or adapter that it reads are refused where they are read.
"""

import torch.distributed as dist
from torch import nn

from megablocks_utils.errors import NonFiniteError
from megablocks_utils.processes.agreement import raise_on_all_ranks
from megablocks_utils.training.resume.resume_point import restore_run
from megablocks_utils.training.resume.run_state import RunState
from megablocks_utils.training.setup import Setup
from megablocks_utils.training.step.finite import FiniteCheck, Shards, check_shards

__all__ = ["build_finite_check", "check_before_saving", "restore_finite"]


def build_finite_check(setup: Setup, model: nn.Module) -> FiniteCheck:
    """Build the check of every step; a debug run always ends at such values."""
    return FiniteCheck(model, None if stops(setup) else lambda line: warn(setup, line))


def restore_finite(setup: Setup, state: RunState) -> None:
    """Put the run back where its checkpoint has it, and refuse one that is not finite.

    **Collective:** every rank must call.

    Raises:
        CheckpointError: on every rank, as `restore_run`.
        NonFiniteError: on every rank, naming the first tensor of the checkpoint.
    """
    assert setup.resume is not None
    restore_run(setup.resume, state, setup.launch)
    check_before_saving(setup, state.shards(), str(setup.resume.folder))


def check_before_saving(
    setup: Setup, shards: Shards, place: str, group: dist.ProcessGroup | None = None
) -> None:
    """Refuse tensors that are not finite, or warn of them if the run is to go on.

    **Collective:** one all-gather over `group`; every rank must call.

    Args:
        setup: the run.
        shards: what this rank holds of the tensors of a checkpoint.
        place: the checkpoint.
        group: None: the default group.

    Raises:
        NonFiniteError: on every rank.
    """
    try:
        raise_on_all_ranks(lambda: check_shards(shards, place), group)
    except NonFiniteError as error:
        if stops(setup):
            raise
        warn(setup, f"{error}")


def stops(setup: Setup) -> bool:
    """Return whether values that are not finite end this run."""
    return setup.config.saving.stop_on_nonfinite or setup.config.debug


def warn(setup: Setup, line: str) -> None:
    """Show a line of warning on rank 0."""
    setup.console.print(f"warning: {line}", markup=False, soft_wrap=True)
