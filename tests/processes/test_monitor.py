"""What real processes do when one of them is killed, fails, or ends as it should."""

import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megablocks_utils.errors import DataError
from megablocks_utils.processes import liveness, monitor
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.processes.liveness import WatchLimits
from megablocks_utils.processes.progress_marks import PROGRESS
from megablocks_utils.processes.start import start_processes
from tests.support.ports import free_port
from tests.support.rank_pool import start_forkserver

WORLD = 4


def _wait_for_key() -> None:
    dist.distributed_c10d._get_default_store().get("never")


def _reduce() -> None:
    dist.all_reduce(torch.zeros(1))


def _sleep() -> None:
    time.sleep(60)


def _fail() -> None:
    raise ValueError("bad data\nand more")


def _refuse() -> None:
    raise DataError("my data.json cannot be read.")


def _finish(after_s: float) -> None:
    time.sleep(after_s)


def _serve(rank: int, environ: dict, folder: str, job, arguments: list) -> None:
    """Be one rank as plain Python would: an exception goes to the hook."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", **environ)
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{folder}/error-{rank}"
    limits = WatchLimits(hang_s=float(environ.get("HANG_S", 600)))
    monitor.POLL_S = liveness.POLL_S = float(environ.get("POLL_S", liveness.POLL_S))
    with open(f"{folder}/stderr-{rank}", "w") as errors:
        os.dup2(errors.fileno(), 2)
    sys.stderr = os.fdopen(2, "w")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def main(argv: list[str]) -> None:
        start_processes(LaunchEnvironment(rank, rank, WORLD), f"{folder}/out", limits=limits)
        dist.all_reduce(torch.zeros(1))
        Path(folder, f"ready-{rank}").touch()
        job(*arguments)

    try:
        run_entry_point(main, [])
    except (RuntimeError, ValueError):
        sys.excepthook(*sys.exc_info())


@contextmanager
def started(folder: Path, *jobs, **environ: str):
    """Start ranks that do their jobs, a function or (function, argument); wait until all are up."""
    start_forkserver()
    context = multiprocessing.get_context("forkserver")
    environ = {"MASTER_PORT": str(free_port()), **environ}
    pairs = [job if isinstance(job, tuple) else (job,) for job in jobs]
    ranks = [
        context.Process(target=_serve, args=(n, environ, str(folder), job, arguments), daemon=True)
        for n, (job, *arguments) in enumerate(pairs)
    ]
    for process in ranks:
        process.start()
    limit_s = time.monotonic() + 60
    while len(list(folder.glob("ready-*"))) < WORLD:
        assert time.monotonic() < limit_s
        time.sleep(0.05)
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.join()


def end_of(ranks, within_s: float) -> list[int]:
    """Return the exit codes; None for a rank that is still there after that time."""
    limit_s = time.monotonic() + within_s
    for process in ranks:
        process.join(max(0.0, limit_s - time.monotonic()))
    return [process.exitcode for process in ranks]


def reason(folder: Path, rank: int) -> str:
    """Return what the launcher's report shows of a rank."""
    return json.loads((folder / f"error-{rank}").read_text())["message"]["extraInfo"][
        "py_callstack"
    ]


def said(folder: Path) -> list[str]:
    """Return the lines that the ranks have written, by rank, without torch's warnings in C++."""
    texts = [(folder / f"stderr-{rank}").read_text() for rank in range(WORLD)]
    lines = [[line for line in text.splitlines() if " lost: " in line] for text in texts]
    assert [rank for rank, text in enumerate(texts) if "Traceback" in text] == []
    return ["\n".join(found) for found in lines]


@pytest.mark.parametrize("victim", [2, 0])  # rank 0 holds the store
def test_survivors_of_a_killed_rank_end_and_one_says_why(tmp_path, victim):
    for name in ("checkpoint-9", "checkpoint-20", "checkpoint-30.incomplete"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "manifest.json").touch()
    with started(tmp_path, _sleep, _reduce, _sleep, _wait_for_key) as ranks:
        victim_pid = ranks[victim].pid
        ranks[victim].kill()
        time.sleep(0.3)
        for process in ranks:  # as torchrun does
            if process.pid != victim_pid:
                os.kill(process.pid, signal.SIGTERM)
        codes = end_of(ranks, within_s=30)
    speaker = 1 if victim == 0 else 0
    lines = said(tmp_path)
    assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(WORLD)]
    assert lines.pop(speaker) == (
        f"rank {victim} (process {victim_pid} on {os.uname().nodename}) was lost: its process is "
        f"gone. The newest complete checkpoint is {tmp_path}/out/checkpoint-20; resume from it "
        "with --resume_from_checkpoint True."
    )
    assert lines == [""] * (WORLD - 1)


def test_ranks_that_end_one_after_the_other_are_not_lost(tmp_path):
    """Nor is one that was suspended, for longer than a poll."""
    with started(tmp_path, *[(_finish, after_s) for after_s in (1.5, 0.0, 3.0, 0.0)]) as ranks:
        os.kill(ranks[0].pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(ranks[0].pid, signal.SIGCONT)
        assert end_of(ranks, within_s=30) == [0] * WORLD
    assert said(tmp_path) == [""] * WORLD


def test_a_failing_rank_is_named_with_its_error(tmp_path):
    with started(tmp_path, _sleep, _fail, _wait_for_key, _sleep) as ranks:
        assert end_of(ranks, within_s=30) == [1] * WORLD
    errors = tmp_path / "stderr-1"
    assert "ValueError: bad data\n" in errors.read_text()
    errors.write_text("")
    lines = said(tmp_path)
    assert lines[1:] == [""] * (WORLD - 1)
    assert lines[0].startswith("rank 1 (process ")
    assert lines[0].endswith(
        f" was lost: ValueError: bad data. There is no complete checkpoint in {tmp_path}/out."
    )
    assert reason(tmp_path, 1).endswith("ValueError: bad data\nand more\n")
    assert {reason(tmp_path, rank) for rank in (0, 2, 3)} == {lines[0]}


def _stand_still() -> None:
    PROGRESS.finish_step(3)
    time.sleep(60)


WORK_S, HANG_S = 6, 3


def _work() -> None:
    """Compute for longer than a hang may last, before the first step; then do as the others."""
    last_s = time.monotonic() + WORK_S
    while time.monotonic() < last_s:
        sum(range(10**6))
    _stand_still()


def test_a_run_that_hangs_as_a_whole_is_ended(tmp_path):
    """Not while one rank still works: loading and compiling have no steps."""
    started_s = time.monotonic()
    jobs = (_work, _stand_still, _stand_still, _sleep)
    with started(tmp_path, *jobs, HANG_S=str(HANG_S), POLL_S="0.5") as ranks:
        assert end_of(ranks, within_s=45) == [1] * WORLD
    assert time.monotonic() - started_s > WORK_S + HANG_S
    sentence = (
        f"this run hangs: no rank has made progress for {HANG_S} s (--hang_timeout_s); rank 3 "
    )
    text = (tmp_path / "stderr-0").read_text()
    assert text.startswith(sentence)
    assert " is starting, before its first step. There is no complete checkpoint in " in text
    assert {reason(tmp_path, rank) for rank in range(WORLD)} == {text.strip()}


def test_an_error_that_the_others_do_not_meet_ends_them_too(tmp_path):
    with started(tmp_path, _reduce, _refuse, _sleep, _wait_for_key) as ranks:
        assert end_of(ranks, within_s=30) == [1, 2, 1, 1]
    lines = said(tmp_path)
    assert " was lost: my data.json cannot be read. There is no" in lines[0]
    assert lines[1:] == [""] * (WORLD - 1)


def test_a_restart_finds_nothing_of_the_start_before(tmp_path):
    """Torchrun's static rendezvous keeps the store: old addresses, and old verdicts."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environ = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for attempt, job in enumerate((_fail, _reduce)):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        with started(folder, *[job] * WORLD, **environ) as ranks:
            codes = end_of(ranks, within_s=30)
        assert codes == [1 - attempt] * WORLD
