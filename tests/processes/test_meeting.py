"""Processes that meet: all come, one is refused, one never comes, one is of another start."""

import threading
import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes import meeting as meeting_module
from megablocks_utils.processes import refusals
from megablocks_utils.processes.meeting import Arrival, Meeting
from megablocks_utils.processes.refusals import announce
from megablocks_utils.processes.status_store import Member


def arrival(rank: int, world_size: int = 3, pid: int | None = None) -> Arrival:
    member = Member(rank, f"host-{rank}", f"machine-{rank}", pid or 100 + rank, "7")
    return Arrival(member, world_size, f"10.0.0.{rank}", "cpu", "digest")


def start(store, me: Arrival, results: dict, limit_s: float = 20.0) -> threading.Thread:
    """Let a process come; what it returns or raises goes to `results`."""

    def come() -> None:
        meeting = Meeting(store, me, {"--seed": str(me.member.rank)}, reports=False)
        try:
            results[me.member.rank] = (meeting.name, meeting.wait(limit_s), meeting)
        except (ConfigurationError, RuntimeError) as error:
            results[me.member.rank] = error

    thread = threading.Thread(target=come, daemon=True)
    thread.start()
    return thread


def finish(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_all_come_and_know_each_other():
    store, results = dist.HashStore(), {}
    finish(*[start(store, arrival(rank), results) for rank in (2, 0, 1)])
    for _, arrivals, meeting in results.values():
        assert arrivals == [arrival(rank) for rank in range(3)]
        assert meeting.read_facts(1) == {"--seed": "1"}


def test_a_meeting_of_an_earlier_start_is_not_taken_for_this_one():
    """Left as it was when it broke off, and as it was when all had come."""
    for ranks in ((0, 1), (0, 1, 2)):
        store, before, results = dist.HashStore(), {}, {}
        threads = [start(store, arrival(rank, pid=1), before, 0.3) for rank in ranks]
        finish(*threads)
        early = [start(store, arrival(rank), results) for rank in (1, 2)]
        time.sleep(0.5)
        assert results == {}
        finish(start(store, arrival(0), results), *early)
        assert [a.member.pid for a in results[1][1]] == [100, 101, 102]


@pytest.mark.parametrize("refused", [0, 2])
def test_all_learn_why_one_was_refused(refused):
    store, results = dist.HashStore(), {}
    others = [rank for rank in range(3) if rank != refused]
    threads = [start(store, arrival(rank), results) for rank in others]
    started_s = time.monotonic()
    me = arrival(refused).member
    announce(store, me, "unknown option --x", covers=1, world_size=3)
    finish(*threads)
    assert time.monotonic() - started_s < 5
    assert {str(results[rank]) for rank in others} == {
        f"rank {refused} (process {100 + refused} on host-{refused}) ended before the run began: "
        "unknown option --x"
    }


def test_ranks_that_are_all_refused_do_not_wait_for_each_other():
    store, started_s = dist.HashStore(), time.monotonic()
    threads = [
        threading.Thread(
            target=announce,
            args=(store, arrival(rank).member, "no"),
            kwargs={"covers": covers, "world_size": 3},
        )
        for rank, covers in ((0, 2), (2, 1))
    ]
    for thread in threads:
        thread.start()
    finish(*threads)
    assert time.monotonic() - started_s < 5


def test_a_refusal_that_nobody_has_waited_for(monkeypatch):
    """One that comes long after it takes it for news only if the refused rank stays away."""
    monkeypatch.setattr(refusals, "_ANNOUNCE_S", 0.2)
    monkeypatch.setattr(meeting_module, "_NOTICE_S", 1.0)
    store, results = dist.HashStore(), {}
    for rank in (1, 2):
        announce(store, arrival(rank).member, f"no {rank}", covers=1, world_size=3)
    finish(start(store, arrival(0), results), start(store, arrival(2), results))
    assert str(results[0]).endswith("ended before the run began: no 1")


def test_who_has_not_come_is_named(capsys, monkeypatch):
    monkeypatch.setattr(meeting_module, "_NOTICE_S", 0.5)
    store = dist.HashStore()
    me = Meeting(store, arrival(0, 4), {}, reports=True)
    thread = start(store, arrival(2, 4), {}, 2.0)
    with pytest.raises(ConfigurationError) as caught:
        me.wait(1.5)
    finish(thread)
    seen = "ranks 1 and 3 of 4 ranks (1 on host-0 and 1 on host-2 here) have not come to "
    assert str(caught.value) == f"{seen}MASTER_ADDR and MASTER_PORT within 2 s."
    assert capsys.readouterr().err.startswith(seen)


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (arrival(1, pid=9), "RANK is 1, but the process 101 on host-1 has that rank; "),
        (arrival(1, 2), "WORLD_SIZE is 2, but rank 0 (process 100 on host-0), which it meets at "),
    ],
)
def test_a_process_that_has_no_place(monkeypatch, second, sentence):
    monkeypatch.setattr(meeting_module, "_STRANGER_S", 0.5)
    store, results = dist.HashStore(), {}
    threads = [start(store, arrival(rank), {}, 3.0) for rank in (0, 1)]
    time.sleep(0.5)
    finish(start(store, second, results))
    assert str(results[1]).startswith(sentence)
    finish(*threads)


def test_arrivals_survive_the_store():
    me = replace(arrival(1), device='A "100"')
    assert Arrival.from_text(me.as_text().encode()) == me
