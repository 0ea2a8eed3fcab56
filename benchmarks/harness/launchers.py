"""Start the processes of a training script, and say how they ended.

Two ways: torchrun, as a user would; and processes forked from one that has imported torch, which
saves a CPU half a minute a run. Both run the same programs with the same options.
"""

import contextlib
import importlib
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from benchmarks.harness.outcome import Ending
from benchmarks.harness.processes import as_words, rank_environment
from benchmarks.harness.provenance import ROOT
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.processes.freed_memory import give_back_freed_memory

FSDP2_SCRIPT = ("train_accelerate_fsdp2.py",)

_PRELOADED = (
    "accelerate",
    "matplotlib.figure",
    "megablocks_utils.training.checkpointer",
    "megablocks_utils.training.loop",
    "megablocks_utils.training.recorder",
    "megablocks_utils.training.setup",
    "torch.distributed.fsdp",
    "transformers.models.mixtral.modeling_mixtral",
)
_SHUTDOWN_S = 60.0
_POLL_S = 1.0
_ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)


@dataclass(frozen=True)
class Job:
    """A run to be started.

    Attributes:
        program: script, or `-m` and module, as torchrun takes it.
        options: by name, of the program.
        ranks: processes.
        folder: where their standard errors go; empty.
        timeout_s: after which they are ended.
    """

    program: tuple[str, ...]
    options: Mapping[str, Any]
    ranks: int
    folder: Path
    timeout_s: float


class Torchrun:
    """Start runs with torchrun."""

    def __call__(self, job: Job) -> Ending:
        """Run a job to its end."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={job.ranks}", "--redirects=3", f"--log-dir={job.folder}"]
        command += [*job.program, *as_words(job.options)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        with _terminated(process):
            try:
                _, stderr = process.communicate(timeout=job.timeout_s)
            except subprocess.TimeoutExpired:
                return Ending.after_timeout(job.timeout_s)
        if process.returncode == 0:
            return Ending(0)
        cause = _ROOT_CAUSE.search(stderr)
        if cause is None:
            return Ending(process.returncode, stderr)
        texts = dict(_read_torchrun_logs(job.folder))
        return _ending(int(cause[1]), int(cause[2]), texts)


class ForkedRanks:
    """Start runs as processes forked from one that has imported the libraries.

    Args:
        frees_at_once: `give_back_freed_memory`, for measuring memory; costs time.
    """

    def __init__(self, *, frees_at_once: bool = False) -> None:
        self._frees_at_once = frees_at_once
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun has it
        forkserver.set_forkserver_preload(list(_PRELOADED))
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)

    def __call__(self, job: Job) -> Ending:
        """Run a job to its end."""
        context = torch.multiprocessing.start_processes(
            _be_rank,
            (job, free_port(), self._frees_at_once),
            nprocs=job.ranks,
            join=False,
            start_method="forkserver",
        )
        deadline = time.monotonic() + job.timeout_s
        try:
            while not context.join(_POLL_S):
                if time.monotonic() > deadline:
                    return Ending.after_timeout(job.timeout_s)
        except torch.multiprocessing.ProcessRaisedException as error:
            return Ending(1, str(error))
        except torch.multiprocessing.ProcessExitedException as error:
            texts = {rank: _read(_log(job.folder, rank)) for rank in range(job.ranks)}
            return _ending(error.error_index, error.exit_code, texts)
        finally:
            _kill(context.processes)
        return Ending(0)


def _be_rank(rank: int, job: Job, port: int, frees_at_once: bool) -> None:
    """Run the program as a rank that torchrun would have started."""
    if frees_at_once:
        give_back_freed_memory({})
    with _log(job.folder, rank).open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    os.environ.update(rank_environment(rank, job.ranks, port))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.path.insert(0, str(ROOT))
    program = importlib.import_module(job.program[-1].removesuffix(".py"))
    run_entry_point(program.main, as_words(job.options))


def _ending(rank: int, exit_code: int, texts: Mapping[int, str]) -> Ending:
    """Return the ending of the rank that failed first, with the text of another if it has none."""
    candidates = [texts.get(rank, ""), *texts.values()]
    return Ending(exit_code, next((text for text in candidates if text.strip()), ""))


def _read_torchrun_logs(folder: Path) -> Iterator[tuple[int, str]]:
    for path in sorted(folder.glob("**/stderr.log")):
        yield int(path.parent.name), _read(path)


@contextlib.contextmanager
def _terminated(process: subprocess.Popen) -> Iterator[None]:
    """End torchrun, which ends its processes, if it still runs."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_SHUTDOWN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _kill(processes: Sequence[multiprocessing.Process]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def free_port() -> int:
    """Return a port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
