"""Where this process is: what tells a run that works from one that hangs.

Torch-free. Between steps only micro-batches count. Elsewhere (loading, tokenizing, compiling,
saving) work has no steps of its own, and what counts is that the process computes, reads or writes.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megablocks_utils.processes.status_store import Standing

__all__ = ["PROGRESS", "Activity", "ProgressMarks"]

_WORKING_SHARE = 0.1  # of one core, above what threads that wait take
_WORKING_BYTES = 2**20
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class ProgressMarks:
    """Take down what this process does; another thread reads it."""

    def __init__(self) -> None:
        self._marks = self._micro_batches = 0
        self._step: int | None = None
        self._phase, self._is_stepping = "starting", False

    @property
    def is_stepping(self) -> bool:
        """Whether only micro-batches count."""
        return self._is_stepping

    def mark(self) -> None:
        """Note progress of any kind."""
        self._marks += 1

    def begin_micro_batch(self) -> None:
        """Note that the micro-batch before is done."""
        self._marks += 1
        self._micro_batches += 1

    def finish_step(self, step: int) -> None:
        """Note a step; from the first one on, a step that stands still is a hang.

        The first may take long: kernels are compiled in it.
        """
        self._marks += 1
        self._step, self._micro_batches = step, 0
        self._phase, self._is_stepping = "training", True

    def begin(self, phase: str) -> None:
        """Note that work without steps begins.

        Args:
            phase: such as "writing the model".
        """
        self._marks += 1
        self._phase, self._is_stepping = phase, False

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Do work without steps, between two steps."""
        before = (self._phase, self._is_stepping)
        self.begin(phase)
        try:
            yield
        finally:
            self._marks += 1
            self._phase, self._is_stepping = before

    def standing(self, count: int) -> Standing:
        """Return a sign of life."""
        return Standing(count, self._marks, self._step, self._micro_batches, self._phase)


PROGRESS = ProgressMarks()
"""Of this process."""


class Activity:
    """Tell whether this process and its children have worked since asked last."""

    def __init__(self) -> None:
        self._before = (time.monotonic(), *_measure(os.getpid()))

    def has_worked(self) -> bool:
        """Return whether they have clearly computed, read or written."""
        now = (time.monotonic(), *_measure(os.getpid()))
        (wall_s, cpu_s, num_bytes), self._before = (
            [after - before for after, before in zip(now, self._before, strict=True)],
            now,
        )
        return cpu_s > _WORKING_SHARE * wall_s or num_bytes > _WORKING_BYTES


def _measure(pid: int) -> tuple[float, float]:
    """Return CPU seconds and bytes read and written of a process and its children."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    except (OSError, ValueError):
        return 0.0, 0.0  # it has gone, or there is no /proc
    cpu_s = sum(map(int, fields[11:15])) / _TICKS_PER_S
    num_bytes = float(io["read_bytes"]) + float(io["write_bytes"])
    below = [_measure(child) for child in children]
    return cpu_s + sum(b[0] for b in below), num_bytes + sum(b[1] for b in below)
