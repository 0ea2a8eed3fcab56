"""Leave a run alone that has finished already."""

import sys

from megablocks_utils.config import RunConfig
from megablocks_utils.processes.agreement import broadcast_from_rank0
from megablocks_utils.processes.finished_run import is_finished_run
from megablocks_utils.processes.launch import LaunchEnvironment

__all__ = ["is_already_done"]


def is_already_done(config: RunConfig, launch: LaunchEnvironment) -> bool:
    """Return whether the run has finished before; rank 0 says so.

    **Collective:** every rank must call; rank 0 looks.
    """
    is_done = broadcast_from_rank0(lambda: is_finished_run(config))
    if is_done and launch.rank == 0:
        sys.stdout.write(f"{config.output_dir} holds this run, finished: nothing is left to do\n")
    return is_done
