"""Stopping a run by a signal: between two micro-steps, on all ranks at the same one."""

import os
import signal
import time
from types import FrameType
from typing import Any, Self

from megablocks_utils.processes.agreement import max_over_ranks

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Ctrl-C under torchrun reaches a worker twice: from the terminal and from torchrun.
_SAME_REQUEST_S = 2.0


class StopRequest:
    """Remember SIGTERM and SIGINT instead of dying of them.

    Use it as a context in the main thread and ask `on_any_rank` after every micro-step. A signal
    that comes at least 2 s after the first ends the process at once, with that signal's default
    action.
    """

    def __init__(self) -> None:
        self._received = 0
        self._agreed = 0
        self._received_s: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        """Name of the signal that `on_any_rank` has reported, such as SIGTERM; empty before."""
        return signal.Signals(self._agreed).name if self._agreed else ""

    def on_any_rank(self) -> bool:
        """Return whether any rank has been asked to stop.

        **Collective:** as `agreement.max_over_ranks`, over the default group.
        """
        # A signal that comes during the exchange counts for the next one: others do not know it.
        self._agreed = max_over_ranks(self._received)
        return self._agreed != 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._received_s is None:
            self._received, self._received_s = number, time.monotonic()
        elif time.monotonic() - self._received_s >= _SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
