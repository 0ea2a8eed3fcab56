"""Programs of rows: each a process of its own, side by side where wanted, within the time.

A kernel that breaks the device breaks the process that launched it, and no other row.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.harness.outcome import Ending
from benchmarks.harness.provenance import ROOT

OUTPUT_NAME, ERROR_NAME = "output.txt", "error.txt"
_POLL_S = 0.05
_KILL_WAIT_S = 10.0
_LOG_CHARS = 2000


@dataclass(frozen=True)
class Program:
    """What a row runs.

    Attributes:
        name: of the row.
        words: after the interpreter's name: a script, or `-m` and a module; then its arguments.
        timeout_s: after which it has failed.
        least_s: seconds it needs at least; not started with less.
        hides_gpu: whether it computes on the CPU, where Triton's interpreter takes its kernels.
        environment: variables that it gets beside this process's.
        stdin: what it reads there.
    """

    name: str
    words: tuple[str, ...]
    timeout_s: float
    least_s: float = 20.0
    hides_gpu: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    stdin: str = ""

    def variables(self) -> dict[str, str]:
        """Return the environment variables that are set for it."""
        hidden = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if self.hides_gpu else {}
        return {"PYTHONPATH": _python_path(), **hidden, **self.environment}


class Running(Protocol):
    """A program that was started."""

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""

    def kill(self) -> None:
        """End it and all that it has started."""


Start = Callable[[Program, Path], Running]
"""Starts a program that leaves `OUTPUT_NAME` and `ERROR_NAME` in a folder."""


@dataclass(frozen=True)
class Finished:
    """How a program ended.

    Attributes:
        program: which.
        folder: where its output lies.
        seconds: it ran.
        ending: of the process; None where the time was used up before it, or while it ran.
    """

    program: Program
    folder: Path
    seconds: float
    ending: Ending | None

    def output(self) -> str:
        """Return what it wrote to standard output."""
        return _read(self.folder / OUTPUT_NAME)

    def log(self) -> str:
        """Return the end of all that it wrote."""
        return "".join(
            _read(self.folder / name)[-_LOG_CHARS:] for name in (OUTPUT_NAME, ERROR_NAME)
        )


class FreshProcess:
    """A new process of this interpreter, in a session of its own."""

    def __init__(self, program: Program, folder: Path) -> None:
        (folder / "input.txt").write_text(program.stdin, encoding="utf-8")
        with (
            (folder / "input.txt").open("rb") as source,
            (folder / OUTPUT_NAME).open("wb") as output,
            (folder / ERROR_NAME).open("wb") as error,
        ):
            self._process = subprocess.Popen(
                [sys.executable, *program.words],
                cwd=ROOT,
                env=os.environ | program.variables(),
                stdin=source,
                stdout=output,
                stderr=error,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End it and its children."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_KILL_WAIT_S)


def run_programs(
    programs: Sequence[Program],
    folder: Path,
    deadline: float,
    *,
    start: Start = FreshProcess,
    jobs: int = 1,
    on_poll: Callable[[], None] = lambda: None,
) -> Iterator[Finished]:
    """Run programs and yield each as it ends, those that time did not suffice for too.

    Args:
        programs: in the order in which they start.
        folder: in which each gets one by its name.
        deadline: of all, as `time.monotonic` counts.
        start: starts one.
        jobs: how many run at once.
        on_poll: called again and again while they run.
    """
    waiting = deque(programs)
    running: list[_Started] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                program = waiting.popleft()
                own = folder / name_folder(program.name)
                if deadline - time.monotonic() < program.least_s:
                    yield Finished(program, own, 0.0, None)
                    continue
                own.mkdir(parents=True, exist_ok=True)
                running.append(_Started(program, own, start(program, own)))
            on_poll()
            for one in list(running):
                finished = one.look(deadline)
                if finished is not None:
                    running.remove(one)
                    yield finished
            if running:
                time.sleep(_POLL_S)
    finally:
        for one in running:
            one.process.kill()


def name_folder(name: str) -> str:
    """Return the name of a row as a folder's."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


class _Started:
    """A program that runs, and since when."""

    def __init__(self, program: Program, folder: Path, process: Running) -> None:
        self.program, self.folder, self.process = program, folder, process
        self._start = time.monotonic()

    def look(self, deadline: float) -> Finished | None:
        """Say how it ended, after ending it where its time is over; None while it runs."""
        code, now = self.process.poll(), time.monotonic()
        seconds = now - self._start
        if code is not None:
            return Finished(self.program, self.folder, seconds, Ending(code, self._read_error()))
        if seconds > self.program.timeout_s:
            self.process.kill()
            ending = Ending.after_timeout(self.program.timeout_s)
            return Finished(self.program, self.folder, seconds, ending)
        if now > deadline:
            self.process.kill()
            return Finished(self.program, self.folder, seconds, None)
        return None

    def _read_error(self) -> str:
        """Return standard error; where there is nothing, standard output."""
        error = _read(self.folder / ERROR_NAME)
        return error if error.strip() else _read(self.folder / OUTPUT_NAME)


def _python_path() -> str:
    """Return this project's root before whatever the variable holds, which wheels may need."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
