"""Who is taken for lost, and who is not: verdicts with made-up machines and a real store."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from megablocks_utils.processes.liveness import (
    DEFAULT_LIMITS,
    STORE_LOSS,
    Watch,
    WatchLimits,
    describe_self,
    is_alive,
)
from megablocks_utils.processes.progress_marks import ProgressMarks
from megablocks_utils.processes.status_store import Loss, Member, Standing, StatusStore

POLLS_UNTIL_SILENT = 45  # beats are read every third poll: fifteen without change


def members(*machines: str) -> list[Member]:
    places = enumerate(machines)
    return [Member(rank, f"host-{name}", name, 100 + rank, "7") for rank, name in places]


class Run:
    """Ranks on machines, none of them real.

    `dead` holds the ranks whose process is gone.
    """

    def __init__(self, *machines: str, limits: WatchLimits = DEFAULT_LIMITS) -> None:
        self.status_store, self.dead = StatusStore(dist.HashStore()), set()
        self.members = members(*machines)
        self.progress = [ProgressMarks() for _ in machines]
        self.watches = [
            Watch(
                self.members,
                rank,
                self.status_store,
                lambda member: member.rank not in self.dead,
                limits=limits,
                progress=self.progress[rank],
            )
            for rank in range(len(machines))
        ]
        for rank in range(len(machines)):
            self.status_store.beat(rank, Standing(-1))

    def look(self, *silent: int) -> list[Loss | None]:
        """Poll on all ranks but the silent ones."""
        ranks = [rank for rank in range(len(self.members)) if rank not in {*silent, *self.dead}]
        return [self.watches[rank].look() for rank in ranks]


def test_a_process_of_the_same_machine_is_lost_at_once_and_named_by_all():
    run = Run("a", "a", "b", "b")
    assert run.look() == [None] * 4
    run.dead = {3}
    run.look()  # rank 2 sees it, after ranks 0 and 1 have looked
    lost = Loss(3, "its process is gone")
    assert run.look() == [lost] * 3
    run.dead = {3, 2}  # the first verdict stands
    assert run.look() == [lost] * 2


def test_a_process_that_left_is_not_lost():
    run = Run("a", "a", "b")
    run.look()
    for rank in (1, 2):
        run.status_store.leave(rank)
        run.dead.add(rank)
    assert [run.look() for _ in range(3 * POLLS_UNTIL_SILENT)] == [[None]] * 3 * POLLS_UNTIL_SILENT


@pytest.mark.parametrize("silent", [2, 0])
def test_a_rank_elsewhere_is_lost_after_45_seconds_without_a_beat(silent):
    run = Run("a", "b", "c")
    run.look()
    answers = [run.look(silent) for _ in range(POLLS_UNTIL_SILENT + 3)]
    first = next(n for n, losses in enumerate(answers, start=1) if any(losses))
    # Rank 0 read before the last beat was given, and sees it three polls later.
    assert first == POLLS_UNTIL_SILENT + (0 if silent == 0 else 3)
    assert set(run.look(silent)) == {Loss(silent, "no sign of life for 45 s")}


def test_one_beat_in_time_is_enough():
    run = Run("a", "b")
    for _ in range(3):
        assert not any(loss for _ in range(40) for loss in run.look(1))
        run.watches[1].look()
        run.watches[1].look()
        run.watches[1].look()


def test_silence_is_counted_in_polls():
    """A rank that was suspended for an hour looks again, and nobody is lost."""
    run = Run("a", "b")
    run.look()
    for count in range(POLLS_UNTIL_SILENT * 2):
        run.status_store.beat(1, Standing(count))
        assert run.watches[0].look() is None


def test_only_rank_0_watches_all_machines():
    """Beats that are read in a poll, by rank: 3 ranks elsewhere, and rank 0 for each of them."""
    run = Run("a", "b", "c", "d")
    reads = []
    read_beats = run.status_store.read_beats
    run.status_store.read_beats = lambda ranks: reads.append(list(ranks)) or read_beats(ranks)
    run.look()
    assert reads == [[1, 2, 3], [0], [0], [0]]


class DeadStore:
    """A store whose process is gone."""

    def __getattr__(self, name):
        def fail(*arguments):
            raise dist.DistNetworkError("Broken pipe")

        return fail


def test_a_store_that_is_gone():
    alive = {1, 2}
    watch = Watch(members("a", "a", "a"), 1, StatusStore(DeadStore()), lambda m: m.rank in alive)
    assert watch.look() == Loss(0, "its process is gone")
    alive.add(0)
    assert [watch.look(), watch.look()] == [None, STORE_LOSS]  # the third failure in all


def test_one_failure_of_the_store_is_forgotten():
    run = Run("a", "a")
    watch, status_store = run.watches[0], run.status_store
    for _ in range(5):
        watch._status_store = StatusStore(DeadStore())
        assert watch.look() is None
        watch._status_store = status_store
        assert watch.look() is None


@pytest.mark.parametrize(
    ("machines", "dead", "loss", "reporters"),
    [
        ("aaaa", {1}, Loss(1, ""), [0]),
        ("aaaa", {0}, Loss(0, ""), [1]),
        ("aaaa", {0, 1}, Loss(1, ""), [2]),
        ("aaaa", set(), Loss(0, ""), [1]),  # it has published its own end and is about to go
        ("aabb", {0, 1}, STORE_LOSS, [2]),
        ("aabb", set(), STORE_LOSS, [0, 2]),
        ("abab", {0, 2}, STORE_LOSS, [1]),
        ("aabb", set(), Loss(2, ""), [0, 3]),  # a log for each machine
        ("aabb", set(), Loss(2, "", is_hang=True), [0, 2]),
    ],
)
def test_who_reports(machines, dead, loss, reporters):
    """The lowest rank that is left on each machine."""
    run = Run(*machines)
    run.dead = dead
    lost = None if loss.is_hang else loss.rank
    ranks = [rank for rank in range(4) if rank not in {*dead, lost}]
    assert [rank for rank in ranks if run.watches[rank].is_first_reporter(loss)] == reporters


def test_a_run_in_which_no_rank_makes_progress():
    """Every rank gives signs of life; the one furthest behind is named with where it is."""
    run = Run("a", "a", "b", limits=WatchLimits(hang_s=60))
    for progress in run.progress:
        progress.finish_step(7)
        progress.begin_micro_batch()
    run.progress[0].begin_micro_batch()
    run.progress[2].begin_micro_batch()
    assert [run.look() for _ in range(57)] == [[None] * 3] * 57
    run.progress[2].mark()  # progress of any kind, on any rank, is enough
    assert [run.look() for _ in range(60)] == [[None] * 3] * 60
    assert any(any(run.look()) for _ in range(6))
    (loss,) = set(run.look())
    assert loss == Loss(
        1,
        "no rank has made progress for 60 s (--hang_timeout_s); rank 1 (process 101 on host-a) is "
        "training, after step 7 and 1 micro-batches",
        is_hang=True,
    )


def test_only_ranks_of_the_run_are_believed():
    run = Run("a", "a", "b")
    store = run.status_store._store
    run.status_store.authenticate(b"secret")
    for rank, progress in enumerate(run.progress):
        run.status_store.beat(rank, progress.standing(0))
    stranger = StatusStore(store)
    stranger.publish(Loss(1, "run this command"))
    stranger.leave(2)
    assert run.look() == [None] * 3
    assert not run.status_store.has_left(2)
    run.dead = {1}
    run.look()
    assert set(run.look()) == {Loss(1, "its process is gone")}
    # Nor does another rank's word count as this one's, or a stranger's beat as a sign of life.
    store.set("left/2", store.get("left/1") if store.check(["left/1"]) else "x")
    stranger.beat(2, Standing(10**6))
    assert not run.status_store.has_left(2)
    assert run.status_store.read_beats([2]) == [None]


def test_work_of_a_child_is_seen_and_waiting_is_not():
    """In a process of its own: ranks that other tests have left are children of this one."""
    body = """
import subprocess, sys, time
from megablocks_utils.processes.progress_marks import Activity
activity = Activity()
time.sleep(0.5)
assert not activity.has_worked()
subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
assert activity.has_worked()
"""
    subprocess.run([sys.executable, "-c", body], check=True)


def test_own_process_and_one_whose_id_is_reused():
    me = describe_self(3)
    assert (me.rank, me.pid, me.host) == (3, os.getpid(), os.uname().nodename)
    assert is_alive(me)
    assert not is_alive(replace(me, started=str(int(me.started) - 1)))
    assert str(me) == f"rank 3 (process {me.pid} on {me.host})"


def test_suspended_is_alive_and_a_zombie_is_not():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    started = stat.rpartition(")")[2].split()[19]
    member = replace(describe_self(1), pid=process.pid, started=started)
    process.send_signal(signal.SIGSTOP)
    assert is_alive(member)
    process.kill()
    limit_s = time.monotonic() + 10
    while is_alive(member):
        assert time.monotonic() < limit_s
    assert Path(f"/proc/{process.pid}").exists()  # nobody has asked for its exit code yet
    process.wait()
    assert not is_alive(member)
