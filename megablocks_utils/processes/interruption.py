"""Stopping a run by a signal: between two micro-steps, on all ranks at the same one."""

import os
import signal
import time
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Ctrl-C under torchrun reaches a worker twice: from the terminal and from torchrun.
_SAME_REQUEST_S = 2.0


class StopRequest:
    """Remember SIGTERM and SIGINT instead of dying of them.

    Use it as a context in the main thread and ask `agreed` after every micro-step. Whoever insists
    gets their way: a signal that comes at least 2 s after the first ends the process at once, with
    that signal's default action.
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
        """Name of the signal that `agreed` has told of, such as SIGTERM; empty before."""
        return signal.Signals(self._agreed).name if self._agreed else ""

    def agreed(self) -> bool:
        """Return whether any rank has been asked to stop.

        **Collective:** all ranks of the default group must call it, as often as each other; it
        sends one number over the CPU. Without a group, or with one rank, it sends nothing.
        """
        # A signal that comes during the exchange counts for the next one: others do not know it.
        self._agreed = self._received
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            number = torch.tensor([self._agreed])
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
            self._agreed = int(number.item())
        return self._agreed != 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._received_s is None:
            self._received, self._received_s = number, time.monotonic()
        elif time.monotonic() - self._received_s >= _SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
