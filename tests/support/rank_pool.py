"""Pools of gloo ranks that the whole pytest session shares.

Starting four processes that import torch costs seconds; handing a case to four processes that are
already connected costs milliseconds. A pool forks its ranks from a forkserver that has imported the
libraries but never computed anything, so no OpenMP state of the pytest process is inherited.
"""

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from tests.support.ports import free_port
from tests.support.rank_worker import report_ready, serve, stack_file

__all__ = ["RankError", "RankPool", "start_forkserver"]

PRELOADED = (
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.optim",
    "accelerate",
    "transformers",
    "transformers.modeling_utils",
    "megablocks_utils.kernels.fused.fused_experts",  # and with it triton
    "tests.support.triton_interpreter",
    "megablocks_utils.training.setup",  # and with it peft
    "megablocks_utils.training.checkpointer",
    "megablocks_utils.training.loop",
    "megablocks_utils.training.recorder",
    "megablocks_utils.training.trainer",
    "matplotlib.figure",
    "tests.support.parity",  # with every family's classes: else each rank imports them
    "tests.support.resuming",
    "tests.support.frozen_imports",  # the last one
)
CLEAN_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRITON_INTERPRET": "1",
}
START_TIMEOUT_S = 120.0
ABANDONED_TIMEOUT_S = (
    300.0  # ranks whose pytest process was killed leave their collective after this
)
GRACE_S = 1.0  # how long the other ranks may still answer after one of them failed
CASES_PER_POOL = 50  # every mesh leaves gloo threads and sockets behind: begin afresh at times


class RankError(RuntimeError):
    """Report a case that failed, died or hung on some ranks.

    Attributes:
        reports: by rank at fault, its traceback, its exit code, or where it hung.
    """

    def __init__(self, name: str, reports: dict[int, str]) -> None:
        self.reports = reports
        parts = [f"rank {rank} {report}" for rank, report in sorted(reports.items())]
        super().__init__("\n".join([f"{name} failed on ranks {sorted(reports)}", *parts]))


class RankPool:
    """Run module-level functions on `world_size` connected gloo ranks.

    The ranks start with the first case, and start again with the first case after a failure, since
    ranks that failed inside a collective no longer agree on which one comes next.

    Example:
        ```python
        def add_ranks(rank, start):
            total = torch.tensor(start + rank)
            dist.all_reduce(total)
            return total

        def test_add_ranks(ranks2):
            assert ranks2.run(add_ranks, 1) == [3, 3]
        ```
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._cases = 0
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any
    ) -> list[Any]:
        """Call `function(rank, *args, **kwargs)` on every rank and return the results by rank.

        Args:
            function: importable from its module (no lambda, no nested function).
            timeout: seconds for all ranks to answer.

        Raises:
            RankError: some rank raised, died, did not answer in time, or returned something other
                than plain data and CPU tensors.
        """
        if self._cases == CASES_PER_POOL or not all(
            process.is_alive() for process in self._processes
        ):
            self.close()
        if not self._processes:
            self._start()
        self._cases += 1
        return self._submit(function, args, kwargs, timeout)

    def close(self) -> None:
        """End all ranks; the next case starts new ones."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        self._processes, self._pipes, self._cases = [], [], 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        start_forkserver()
        context = multiprocessing.get_context("forkserver")
        self._folder = tempfile.TemporaryDirectory(prefix="rank_pool_")
        port = free_port()
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=serve,
                args=(rank, self.world_size, port, self._folder.name, there),
                daemon=True,
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        self._submit(report_ready, (), {}, START_TIMEOUT_S)

    def _submit(
        self, function: Callable[..., Any], args: tuple, kwargs: dict, timeout: float
    ) -> list[Any]:
        job = pickle.dumps((function, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        results, reports = self._collect(time.monotonic() + timeout)
        missing = [
            rank for rank in range(self.world_size) if rank not in results and rank not in reports
        ]
        if missing and not reports:
            stacks = self._stacks(missing)
            reports = {
                rank: f"did not answer within {timeout:g} s; it was at\n{stacks[rank]}"
                for rank in missing
            }
        if reports:
            self.close()
            raise RankError(getattr(function, "__qualname__", repr(function)), reports)
        return [pickle.loads(results[rank]) for rank in range(self.world_size)]

    def _collect(self, deadline: float) -> tuple[dict[int, bytes], dict[int, str]]:
        """Return the pickled results and the failure reports that arrive before the deadline."""
        results: dict[int, bytes] = {}
        reports: dict[int, str] = {}
        pending = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while pending:
            for pipe in wait(list(pending), max(0.0, deadline - time.monotonic())):
                rank = pending.pop(pipe)
                report = self._receive(rank, pipe, results)
                if report:
                    reports[rank] = report
                    deadline = min(deadline, time.monotonic() + GRACE_S)
            if time.monotonic() >= deadline:
                break
        return results, reports

    def _receive(self, rank: int, pipe: Connection, results: dict[int, bytes]) -> str | None:
        """Store what one rank sends, or return its failure report."""
        try:
            succeeded, answer = pipe.recv_bytes(), pipe.recv_bytes()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(GRACE_S)
            return f"died with exit code {self._processes[rank].exitcode}"
        if succeeded == b"raised":
            return f"raised\n{answer.decode()}"
        results[rank] = answer
        return None

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        """Return the Python stacks of ranks that hang."""
        for rank in ranks:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.2)
        return {rank: stack_file(self._folder.name, rank).read_text() for rank in ranks}


def start_forkserver() -> None:
    """Start the process the ranks are forked from: libraries imported, GPUs hidden, one thread."""
    before = {name: os.environ.get(name) for name in CLEAN_ENVIRONMENT}
    os.environ.update(CLEAN_ENVIRONMENT)
    try:
        forkserver.set_forkserver_preload(list(PRELOADED))
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
