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
    STORE_LOSS,
    Loss,
    Member,
    StatusStore,
    Watch,
    describe_self,
    is_alive,
)

POLLS_UNTIL_SILENT = 45  # beats are read every third poll: fifteen without change


def members(*machines: str) -> list[Member]:
    places = enumerate(machines)
    return [Member(rank, f"host-{name}", name, 100 + rank, "7") for rank, name in places]


class Run:
    """Ranks on machines, none of them real.

    `dead` holds the ranks whose process is gone.
    """

    def __init__(self, *machines: str) -> None:
        self.status_store, self.dead, self.members = (
            StatusStore(dist.HashStore()),
            set(),
            members(*machines),
        )
        self.watches = [
            Watch(
                self.members, rank, self.status_store, lambda member: member.rank not in self.dead
            )
            for rank in range(len(machines))
        ]
        for rank in range(len(machines)):
            self.status_store.beat(rank, -1)

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
        run.status_store.beat(1, count)
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
    ("machines", "dead", "loss", "speaker"),
    [
        ("aaaa", {1}, Loss(1, ""), 0),
        ("aaaa", {0}, Loss(0, ""), 1),
        ("aaaa", {0, 1}, Loss(1, ""), 2),
        ("aaaa", set(), Loss(0, ""), 1),  # it has published its own end and is about to go
        ("aabb", {0, 1}, STORE_LOSS, 2),
        ("aabb", set(), STORE_LOSS, 0),
        ("abab", {0, 2}, STORE_LOSS, 1),
    ],
)
def test_who_speaks(machines, dead, loss, speaker):
    """The lowest rank that is left; a machine that is lost is only known by its store."""
    run = Run(*machines)
    run.dead = dead
    ranks = [rank for rank in range(4) if rank not in {*dead, loss.rank}]
    first = [rank for rank in ranks if run.watches[rank].is_first_reporter(loss)]
    assert speaker in first
    if not (loss is STORE_LOSS and not dead):  # machine b takes a for lost, and both speak
        assert first == [speaker]


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
