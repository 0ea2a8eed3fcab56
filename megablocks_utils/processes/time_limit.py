"""A run's wall time: when it must save so as to have ended before its time is up. Torch-free."""

import os
import time
from collections import deque
from pathlib import Path

from megablocks_utils.config.option import Duration
from megablocks_utils.config.values import parse_duration

__all__ = ["TimeLimit"]

_MARGIN_S = 30.0  # for what is not measured, such as the end of the processes
_MARGIN_SHARE = 0.05  # of a limit that is short
_REMEMBERED = 16  # steps and saves whose longest counts
_SLOW_DISK_BYTES_S = 2e8  # until a save has been measured
_IMPORTED_S = time.monotonic()


class TimeLimit:
    """Decide whether another step fits into the time that is left.

    The clock starts with the launcher's process, where torchrun or Accelerate has started this one:
    its start and restarts count too.

    Args:
        limit: as `--time_limit` has it.
        age_s: of the run; None: since it was started.
    """

    def __init__(self, limit: Duration, age_s: float | None = None) -> None:
        limit_s = parse_duration(limit)
        assert limit_s is not None, "options are checked where they are read"
        age_s = _read_age_s() if age_s is None else age_s
        self._ends_s = time.monotonic() + limit_s - age_s
        self._margin_s = min(_MARGIN_S, _MARGIN_SHARE * limit_s)
        self._steps_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._pauses_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._saves_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._first_save_s = 0.0
        self._asked_s = self._step_ended_s = time.monotonic()
        self._is_step_start = True

    def expect_save(self, num_bytes: int) -> None:
        """Take the size of what this rank will save, for the time before one is measured."""
        self._first_save_s = num_bytes / _SLOW_DISK_BYTES_S

    def add_save(self, seconds: float) -> None:
        """Take how long a checkpoint has taken to write."""
        self._saves_s.append(seconds)

    def end_step(self) -> None:
        """Take note that a step is over, saving included."""
        now_s = time.monotonic()
        self._steps_s.append(now_s - self._step_ended_s)
        self._step_ended_s, self._is_step_start = now_s, True

    def is_nearly_up(self, *, num_saves: int = 1) -> bool:
        """Return whether the run must stop now; asked before every micro-step.

        Before a step, the whole step must fit. Within one, which has taken longer than those
        before, the next micro-step must.

        Args:
            num_saves: to be waited for at the end, one in the background included.
        """
        now_s = time.monotonic()
        if not self._is_step_start:
            self._pauses_s.append(now_s - self._asked_s)
        durations_s = self._steps_s if self._is_step_start else self._pauses_s
        self._asked_s, self._is_step_start = now_s, False
        save_s = max(self._saves_s, default=self._first_save_s)
        needed_s = max(durations_s, default=0.0) + num_saves * save_s + self._margin_s
        return now_s + needed_s >= self._ends_s


def _read_age_s() -> float:
    """Return the age of this process, or of the launcher that has started it."""
    pids = [os.getpid()]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        pids.append(os.getppid())
    ages = [age for pid in pids if (age := _read_process_age_s(pid)) is not None]
    return max(ages, default=time.monotonic() - _IMPORTED_S)


def _read_process_age_s(pid: int) -> float | None:
    try:
        # The name before the last parenthesis may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
    except (OSError, AttributeError, IndexError, ValueError):  # no such /proc
        return None
