"""Stopping a run by a signal or at its time limit: on all ranks at the same micro-step."""

import os
import signal
import time
from types import FrameType
from typing import Any, Self

from megablocks_utils.processes.agreement import max_over_ranks
from megablocks_utils.processes.early_signals import take_early_signal

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_TIME_IS_UP = 1000  # instead of a signal's number, which are all smaller
# Within a step ranks agree about this often: a launcher waits for 30 s after SIGTERM.
_ASK_EVERY_MS = 2000
_PACES_MS = 2**24  # more than any; above it in the number that is agreed on: who has asked
# Ctrl-C under torchrun reaches a worker twice: from the terminal and from torchrun.
_SAME_REQUEST_S = 2.0


class StopRequest:
    """Remember SIGTERM, SIGINT and SIGUSR1 instead of dying of them.

    Use it as a context in the main thread and ask `on_any_rank` before every micro-step. SIGTERM or
    SIGINT at least 2 s after the first of them end the process at once, with the signal's default
    action. SIGUSR1 never insists: batch systems send it minutes before SIGTERM.
    """

    def __init__(self) -> None:
        self._received = 0
        self._agreed = 0
        self._received_s: float | None = None
        self._asked_s, self._micro_steps, self._left_out = time.monotonic(), 0, 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        self._received = take_early_signal()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        """What `on_any_rank` has reported, such as SIGTERM or --time_limit; empty before."""
        if self._agreed == _TIME_IS_UP:
            return "--time_limit"
        return signal.Signals(self._agreed).name if self._agreed else ""

    def on_any_rank(self, *, is_time_up: bool = False, is_step_start: bool = True) -> bool:
        """Return whether any rank has been asked to stop, or its time is up.

        Ranks agree before a step, and within one that takes seconds; else this is no.

        **Collective:** as `agreement.max_over_ranks`, over the default group, where they agree.

        Args:
            is_time_up: whether this rank wants to stop by itself.
            is_step_start: whether a step begins; the same on all ranks.
        """
        self._micro_steps += 1
        if not is_step_start and self._left_out > 0:
            self._left_out -= 1
            return False
        now_s = time.monotonic()
        pace_ms = int(1000 * (now_s - self._asked_s) / self._micro_steps)
        self._asked_s, self._micro_steps = now_s, 0
        # A signal that comes during the exchange counts for the next one: others do not know it.
        asked = self._received or (_TIME_IS_UP if is_time_up else 0)
        agreed = max_over_ranks(asked * _PACES_MS + min(pace_ms, _PACES_MS - 1))
        self._agreed, pace_ms = divmod(agreed, _PACES_MS)
        self._left_out = _ASK_EVERY_MS // max(1, pace_ms)
        return self._agreed != 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._received = self._received or number
        elif self._received_s is None:
            self._received, self._received_s = number, time.monotonic()
        elif time.monotonic() - self._received_s >= _SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
