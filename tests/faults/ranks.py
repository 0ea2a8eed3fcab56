"""The ranks of a real run, which can be stopped and killed one by one.

They are processes of their own, connected as a launcher connects them, and they call what the
scripts call. Only their start is quick: they are forked from a process that has imported the
libraries.
"""

import importlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import MappingProxyType, TracebackType

from megablocks_utils.processes.entry_point import run_entry_point
from tests.support.argv import keep_last
from tests.support.ports import free_port
from tests.support.rank_pool import start_forkserver

__all__ = ["SCRIPTS", "ScriptRun", "run_script"]

SCRIPTS = {"fsdp2": "train_accelerate_fsdp2", "fsdp1": "train_fsdp1"}
STOPPED_STATES = "Tt"
FREEZE_TIMEOUT_S = 10.0
_LOST = re.compile(r"^(?:rank \d+|the store of this run) \(.*\) was lost: .*$", re.MULTILINE)


class ScriptRun:
    """Start a script on `world_size` ranks; what each says goes to `logs/<rank>.log`.

    A context manager: leaving it kills whoever is left.

    Args:
        script: one of `SCRIPTS`, or another module with a `main`.
        argv: its options.
        logs: a folder that is made.
        world_size: number of ranks.
        own_words: what single ranks are given besides.
        are_hosts: whether each rank is told that it is alone on its host.
    """

    def __init__(
        self,
        script: str,
        argv: Sequence[str],
        logs: Path,
        *,
        world_size: int = 4,
        own_words: Mapping[int, Sequence[str]] = MappingProxyType({}),
        are_hosts: bool = False,
    ) -> None:
        start_forkserver()
        context = multiprocessing.get_context("forkserver")
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"{rank}.log" for rank in range(world_size)]
        port = free_port()
        self._processes = [
            context.Process(
                target=_be_rank,
                args=(
                    SCRIPTS.get(script, script),
                    keep_last([*argv, *own_words.get(rank, ())]),
                    _describe_launch(rank, world_size, port, are_hosts=are_hosts),
                    log,
                ),
                daemon=True,
            )
            for rank, log in enumerate(self._logs)
        ]
        for process in self._processes:
            process.start()

    def __enter__(self) -> "ScriptRun":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    @property
    def ranks(self) -> range:
        """All ranks."""
        return range(len(self._processes))

    @property
    def pids(self) -> list[int]:
        """Process id of each rank."""
        return [process.pid for process in self._processes]

    def is_running(self) -> bool:
        """Return whether all ranks are there."""
        return all(process.is_alive() for process in self._processes)

    def is_any_running(self) -> bool:
        """Return whether some rank is there."""
        return any(process.is_alive() for process in self._processes)

    def freeze(self) -> None:
        """Stop all ranks where they are, so that the world can be looked at.

        Raises:
            ProcessLookupError: one of them has ended.
        """
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)
        deadline = time.monotonic() + FREEZE_TIMEOUT_S
        while not all(_read_state(pid) in STOPPED_STATES for pid in self.pids):
            if time.monotonic() > deadline:
                raise ProcessLookupError("a rank cannot be stopped")
            time.sleep(0.0005)

    def kill(self, ranks: Iterable[int]) -> None:
        """Send SIGKILL to some ranks."""
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGKILL)

    def thaw(self) -> None:
        """Let the ranks that are left go on."""
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGCONT)

    def wait(self, timeout_s: float, ranks: Iterable[int] | None = None) -> list[int]:
        """Wait for the end of ranks, and return their exit codes; negative for a signal.

        Args:
            timeout_s: for all of them.
            ranks: None for all.

        Raises:
            TimeoutError: with what they said.
        """
        processes = [self._processes[rank] for rank in ranks or self.ranks]
        deadline = time.monotonic() + timeout_s
        pending = {process.sentinel for process in processes}
        while pending:
            ready = wait(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{len(pending)} ranks have not ended:\n{self.output()}")
            pending -= set(ready)
        for process in processes:
            process.join()
        return [process.exitcode for process in processes]

    def finish(self, timeout_s: float) -> None:
        """Wait for a run that must succeed.

        Raises:
            RuntimeError: it has not.
        """
        codes = self.wait(timeout_s)
        if any(codes):
            raise RuntimeError(f"the ranks ended with {codes}:\n{self.output()}")

    def output(self) -> str:
        """Return what all ranks have said."""
        return "".join(log.read_text(errors="replace") for log in self._logs if log.is_file())

    def outputs(self) -> list[str]:
        """Return what each rank has said."""
        return [log.read_text(errors="replace") for log in self._logs]

    def losses(self) -> list[str]:
        """Return every sentence about a lost rank."""
        return _LOST.findall(self.output())


def _read_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError as error:
        raise ProcessLookupError(f"process {pid} has ended") from error


def _describe_launch(rank: int, world_size: int, port: int, *, are_hosts: bool) -> dict[str, str]:
    """Return what a launcher sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": "0" if are_hosts else str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": "1" if are_hosts else str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _be_rank(module: str, argv: list[str], launch: Mapping[str, str], log: Path) -> None:
    """Do what `python <script> <argv>` does under a launcher."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.update(launch)
    run_script(module, argv)


def run_script(module: str, argv: list[str]) -> None:
    """Do what an interpreter of its own does with a script, in a process that was forked."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [f"{module}.py", *argv]
    try:
        run_entry_point(importlib.import_module(module).main, argv)
    except SystemExit:
        raise
    except BaseException:  # noqa: BLE001 - where the interpreter would call the hook of `monitor`
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def _exit_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
