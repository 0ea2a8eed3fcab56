"""Run what came with a model: a chat template or a tokenizer that someone else wrote.

Whatever it raises, takes too long for or needs too much memory for becomes one sentence.
"""

import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from megablocks_utils.errors import UserError

__all__ = ["ForeignCode", "MemoryLimit"]

_AGAIN_S = 1.0
"""Seconds after which the alarm comes again: code may swallow it where nothing can be raised."""
_MESSAGE_CHARACTERS = 300


class _TooSlow(BaseException):
    """End code at its time limit; no `Exception`, which that code might catch."""


class ForeignCode:
    """Turn every exception of the code inside this context into an error for the user.

    Errors for the user pass as they are, and so do requests to stop.

    Args:
        to_error: makes the error from what went wrong.
        limit_s: seconds that the code may take; 0 for any time. It holds in the main thread, where
            alone a signal can interrupt Python; an alarm that is set already goes on afterwards.
    """

    def __init__(self, to_error: Callable[[str], UserError], *, limit_s: float = 0.0) -> None:
        self._to_error = to_error
        self._limit_s = limit_s
        self._is_limited = False

    def __enter__(self) -> Self:
        if self._limit_s and threading.current_thread() is threading.main_thread():
            self._is_limited = True
            self._started_s = time.monotonic()
            self._handler = signal.signal(signal.SIGALRM, self._interrupt)
            self._timer = signal.setitimer(signal.ITIMER_REAL, self._limit_s, _AGAIN_S)
        return self

    def __exit__(
        self, _kind: object, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self._is_limited:
            self._stop_timer()
        if isinstance(error, _TooSlow):
            raise self._to_error(f"it takes more than {self._limit_s:g} s") from None
        if isinstance(error, UserError) or not _is_failure(error):
            return
        raise self._to_error(_describe(error)) from error

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self._is_limited:
            raise _TooSlow

    def _stop_timer(self) -> None:
        self._is_limited = False
        left_s, interval_s = self._timer
        if left_s:
            left_s = max(left_s - (time.monotonic() - self._started_s), 1e-3)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._handler)
        signal.setitimer(signal.ITIMER_REAL, left_s, interval_s)


class MemoryLimit:
    """Let the code inside this context allocate no more than a number of bytes at once.

    Python raises MemoryError beyond it, where the system would end the process. Without effect
    where the system does not say how much the process has.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._before: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        try:
            pages = int(Path("/proc/self/statm").read_bytes().split()[0])
        except OSError:
            return self
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = pages * resource.getpagesize() + self._limit_bytes
        if soft == resource.RLIM_INFINITY or wanted < soft:
            self._before = (soft, hard)
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
        return self

    def __exit__(self, *_error: object) -> None:
        if self._before is not None:
            resource.setrlimit(resource.RLIMIT_AS, self._before)


def _is_failure(error: BaseException | None) -> bool:
    """Say whether it is what failing code raises; a panic of Rust code is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _describe(error: BaseException | None) -> str:
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    reason = " ".join(str(error).split())[:_MESSAGE_CHARACTERS]
    kind = type(error).__name__
    if kind in ("Exception", "TemplateError", "PanicException", "OSError", "ValueError"):
        return reason or kind
    return f"{reason} ({kind})" if reason else kind
