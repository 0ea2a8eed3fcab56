"""A process that ends before the processes have met tells those on other machines why.

Its launcher ends the processes of its own machine; those elsewhere would wait for it. Torch-free
until there is somebody to tell.
"""

import os
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes.error_file import write_error_file
from megablocks_utils.processes.launch import LaunchEnvironment, check_environment
from megablocks_utils.processes.liveness import describe_self
from megablocks_utils.processes.refusals import announce

__all__ = ["announce_early_exit", "count_covered", "report_crashes", "stop_announcing"]


class _Announcer:
    """Hold whether the others still have to be told."""

    is_needed = True


_announcer = _Announcer()


def stop_announcing() -> None:
    """Leave it to the meeting, and then to the monitor, to tell the others."""
    _announcer.is_needed = False


def announce_early_exit(reason: str, environ: Mapping[str, str] = os.environ) -> None:
    """Tell processes on other machines why this one ends, if they have not met yet.

    Args:
        reason: one sentence.
        environ: the launcher's environment.
    """
    if not _announcer.is_needed:
        return
    stop_announcing()
    try:
        launch = check_environment(environ=environ)
    except ConfigurationError:
        return  # without an address there is nobody to be told
    if launch.has_one_host:
        return
    try:
        from megablocks_utils.processes.connection import connect_to_store

        store = connect_to_store(launch, environ)
        announce(
            store,
            describe_self(launch.rank),
            reason,
            covers=count_covered(launch),
            world_size=launch.world_size,
        )
    except (ConfigurationError, ImportError, RuntimeError):
        return  # likewise, or they have gone


def count_covered(launch: LaunchEnvironment) -> int:
    """Return how many ranks are known to end where this one ends: those of its machine, or it."""
    return (launch.local_world_size or 1) if launch.local_rank == 0 else 1


def report_crashes() -> None:
    """Tell the launcher and the other machines of an exception that nothing catches."""
    hook_before = sys.excepthook

    def report(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        hook_before(kind, error, trace)
        sys.stderr.flush()
        write_error_file("".join(traceback.format_exception(kind, error, trace)))
        if not issubclass(kind, KeyboardInterrupt):
            first_line = "".join(str(error).strip().splitlines()[:1])
            announce_early_exit(f"{kind.__name__}: {first_line}")

    sys.excepthook = report
