"""The pool itself: results by rank, failures named, a working pool afterwards."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch.distributed.device_mesh import init_device_mesh

from tests.support import rank_pool
from tests.support.rank_pool import RankError, RankPool, start_forkserver


def add_ranks(rank, start, *, scale=1):
    total = torch.tensor(float(start + scale * rank))
    dist.all_reduce(total)
    return {"rank": rank, "total": total, "pid": os.getpid(), "threads": torch.get_num_threads()}


def raise_on_rank_1(rank):
    if rank == 1:
        raise ValueError("expert 7 is missing")
    dist.barrier()


def exit_on_rank_0(rank):
    if rank == 0:
        raise SystemExit(2)


def die_on_rank_1(rank):
    if rank == 1:
        os._exit(7)


def hang_on_rank_1(rank):
    if rank == 1:
        time.sleep(60)


def return_unpicklable(rank):
    return lambda: rank


def send_back(rank, value):
    return value


def describe_accelerator(rank, mixed_precision):
    leftover = bool(PartialState._shared_state or AcceleratorState._shared_state)
    marked = "LEFT_BEHIND" in os.environ or os.environ["MASTER_ADDR"] == "changed"
    draws = (random.random(), float(torch.rand(())))
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    os.environ.update(LEFT_BEHIND="1", MASTER_ADDR="changed")
    gathered = accelerator.gather(torch.tensor([rank])).tolist()
    return leftover, marked, draws, accelerator.mixed_precision, accelerator.process_index, gathered


def build_mesh(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    total = torch.tensor(float(rank))
    dist.all_reduce(total, group=mesh["ep"].get_group())
    return mesh.get_local_rank("dp"), mesh.get_local_rank("ep"), float(total)


def test_results_come_back_by_rank_from_lasting_processes():
    with RankPool(4) as pool:  # the session's may begin afresh between the two
        first = pool.run(add_ranks, 1, scale=10)
        second = pool.run(add_ranks, 2)
    assert [answer["rank"] for answer in first] == [0, 1, 2, 3]
    assert [float(answer["total"]) for answer in first] == [64.0] * 4
    assert [float(answer["total"]) for answer in second] == [14.0] * 4
    assert [answer["pid"] for answer in first] == [answer["pid"] for answer in second]
    assert len({answer["pid"] for answer in first} | {os.getpid()}) == 5
    assert {answer["threads"] for answer in first} == {1}


def test_meshes_work(ranks4):
    assert ranks4.run(build_mesh) == [(0, 0, 1.0), (0, 1, 1.0), (1, 0, 5.0), (1, 1, 5.0)]


def test_large_tensors_travel_both_ways(ranks2):
    sent = torch.arange(1_000_000.0)
    for received in ranks2.run(send_back, sent):
        assert torch.equal(received, sent)


def test_each_case_starts_clean_and_builds_its_own_accelerator(ranks2):
    first = ranks2.run(describe_accelerator, "no")
    second = ranks2.run(describe_accelerator, "bf16")
    for rank, (before, after) in enumerate(zip(first, second, strict=True)):
        assert before[:2] == after[:2] == (False, False)
        assert before[2] == after[2]
        assert (before[3], after[3]) == ("no", "bf16")
        assert before[4:] == after[4:] == (rank, [0, 1])


def test_exception_carries_the_rank_s_traceback_and_the_pool_recovers(ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(raise_on_rank_1)
    assert list(caught.value.reports) == [1]
    assert str(caught.value).startswith(
        "raise_on_rank_1 failed on ranks [1]\nrank 1 raised\nTraceback"
    )
    assert "ValueError: expert 7 is missing" in str(caught.value)
    assert [float(answer["total"]) for answer in ranks2.run(add_ranks, 0)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("function", "rank", "report"),
    [
        (exit_on_rank_0, 0, "SystemExit: 2"),
        (die_on_rank_1, 1, "died with exit code 7"),
        (return_unpicklable, 0, "Can't pickle"),
    ],
    ids=["sys.exit", "death", "unpicklable"],
)
def test_other_ends_of_a_rank_are_reported(ranks2, function, rank, report):
    with pytest.raises(RankError) as caught:
        ranks2.run(function)
    assert report in caught.value.reports[rank].replace("Can't get local object", "Can't pickle")
    assert [float(answer["total"]) for answer in ranks2.run(add_ranks, 0)] == [1.0, 1.0]


def test_hang_names_the_rank_and_its_line_and_the_pool_recovers(ranks2):
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks2.run(hang_on_rank_1, timeout=0.5)
    assert time.monotonic() - start < 10
    assert list(caught.value.reports) == [1]
    assert caught.value.reports[1].startswith("did not answer within 0.5 s; it was at")
    assert "in hang_on_rank_1" in caught.value.reports[1]
    assert [float(answer["total"]) for answer in ranks2.run(add_ranks, 0)] == [1.0, 1.0]


def test_pool_begins_afresh_after_many_cases(monkeypatch):
    monkeypatch.setattr(rank_pool, "CASES_PER_POOL", 2)
    with RankPool(2) as pool:
        pids = [pool.run(add_ranks, 0)[0]["pid"] for _ in range(3)]
    assert pids[0] == pids[1] != pids[2]


def hang_and_tell_pid(rank, folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)


def hang_a_pool(folder):
    """Be what pytest is to its ranks, with a forkserver that has only what they need to hang."""
    rank_pool.PRELOADED = ("tests.support.rank_worker",)
    RankPool(2).run(hang_and_tell_pid, folder)


def wait_until(condition, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_ranks_leave_with_a_killed_parent_even_when_they_hang(tmp_path):
    start_forkserver()
    parent = multiprocessing.get_context("forkserver").Process(
        target=hang_a_pool, args=(str(tmp_path),)
    )
    parent.start()
    try:
        assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    finally:
        parent.kill()
        parent.join()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids), timeout=20)


def test_case_costs_milliseconds(ranks2):
    ranks2.run(send_back, 0)
    durations = []
    for _ in range(20):
        start = time.monotonic()
        ranks2.run(send_back, 0)
        durations.append(time.monotonic() - start)
    assert sorted(durations)[10] < 0.1
