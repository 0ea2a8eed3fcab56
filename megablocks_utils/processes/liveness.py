"""Lost ranks: every rank watches the others, and ends when one of them is gone.

Torch-free: the store is handed in. A process on the same machine is watched by its process id, so
one that is busy or suspended for minutes is not lost. One elsewhere is watched by a counter in the
store: rank 0 watches all of them, the others watch rank 0 and the verdict. Rank 0 also sees when no
rank makes progress any more.
"""

import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megablocks_utils.processes.progress_marks import ProgressMarks
from megablocks_utils.processes.status_store import Loss, Member, Standing, StatusStore

__all__ = [
    "DEFAULT_LIMITS",
    "POLL_S",
    "STORE_LOSS",
    "Watch",
    "WatchLimits",
    "describe_self",
    "is_alive",
]

POLL_S = 1.0
_BEAT_POLLS = 3  # polls between two beats
_GONE = "its process is gone"
_STORE_POLLS = 3  # polls that the store may fail, for the process ids to tell who is gone


@dataclass(frozen=True)
class WatchLimits:
    """How long the ranks of a run wait for each other.

    Attributes:
        lost_s: A rank on another machine without a sign of life for so long is lost.
        hang_s: A run in which no rank makes progress for so long is ended.
    """

    lost_s: float = 45.0
    hang_s: float = 600.0


DEFAULT_LIMITS = WatchLimits()

STORE_LOSS = Loss(None, "it no longer answers")


def describe_self(rank: int) -> Member:
    """Return where this process is."""
    host, pid = os.uname().nodename, os.getpid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        started = _read_stat(pid)[19]
    except OSError:  # no /proc: this process cannot be watched by its id
        machine, started = str(uuid.uuid4()), ""
    return Member(rank, host, machine, pid, started)


def is_alive(member: Member) -> bool:
    """Return whether a process on this machine is there; a zombie is not."""
    try:
        stat = _read_stat(member.pid)
    except OSError:
        return False
    return stat[0] not in ("Z", "X") and stat[19] == member.started


def _read_stat(pid: int) -> list[str]:
    """Return the fields after the name, which may hold blanks: the state, ..., [19] the start."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


class Watch:
    """Decide, poll by poll, whether a rank is lost, or all of them hang.

    It counts polls, not seconds: a rank that was suspended for a while must not take the others for
    silent.

    Args:
        members: all ranks, in their order.
        rank: this one.
        status_store: of the run.
        alive: returns whether a process of this machine is there.
        limits: how long to wait.
        progress: of this rank.
    """

    def __init__(
        self,
        members: Sequence[Member],
        rank: int,
        status_store: StatusStore,
        alive: Callable[[Member], bool] = is_alive,
        *,
        limits: WatchLimits = DEFAULT_LIMITS,
        progress: ProgressMarks | None = None,
    ) -> None:
        self._me, self._members = members[rank], members
        self._status_store, self._alive, self._limits = status_store, alive, limits
        self._progress = progress or ProgressMarks()
        others = [member for member in members if member.rank != rank]
        self._near = [member for member in others if self._is_near(member)]
        self._far = [m for m in others if not self._is_near(m) and (rank == 0 or m.rank == 0)]
        self._beats: dict[int, Standing | None] = {}
        self._silent = dict.fromkeys((member.rank for member in others), 0)
        self._polls = self._failures = self._stalled = 0

    def look(self) -> Loss | None:
        """Check all ranks once; call it every `POLL_S`.

        Returns:
            The verdict; None while no rank is lost.
        """
        try:
            loss = self._status_store.read_verdict()
            if loss is None and self._polls % _BEAT_POLLS == 0:
                self._status_store.beat(self._me.rank, self._progress.standing(self._polls))
                loss = self._read_beats()
            loss = loss or self._find_dead()
            self._failures = 0
        except RuntimeError:
            self._failures += 1
            return self._find_dead_without_store()
        finally:
            self._polls += 1
        return loss

    def is_first_reporter(self, loss: Loss) -> bool:
        """Return whether this is the lowest rank that is left on its machine.

        One rank of each machine reports the loss: logs stay on their machine.
        """
        below = [member for member in self._members[: self._me.rank] if self._is_near(member)]
        lost = None if loss.is_hang else loss.rank
        return not any(self._alive(member) for member in below if member.rank != lost)

    def _is_near(self, member: Member) -> bool:
        return member.machine == self._me.machine

    def _find_dead(self) -> Loss | None:
        for member in [member for member in self._near if not self._alive(member)]:
            if self._status_store.has_left(member.rank):
                self._near.remove(member)
            else:
                return self._status_store.publish(Loss(member.rank, _GONE))
        return None

    def _read_beats(self) -> Loss | None:
        watched = self._near + self._far if self._me.rank == 0 else self._far
        ranks = [member.rank for member in watched]
        before = dict(self._beats)
        for rank, beat in zip(ranks, self._status_store.read_beats(ranks), strict=True):
            is_silent = beat is None or beat == before.get(rank)
            self._silent[rank] = self._silent[rank] + 1 if is_silent else 0
            self._beats[rank] = beat or before.get(rank)
        loss = self._find_silent()
        return loss or (self._find_hang(before) if self._me.rank == 0 else None)

    def _find_silent(self) -> Loss | None:
        beats = max(1, round(self._limits.lost_s / (_BEAT_POLLS * POLL_S)))
        for member in [m for m in self._far if self._silent[m.rank] >= beats]:
            if self._status_store.has_left(member.rank):
                self._far.remove(member)
            else:
                reason = f"no sign of life for {beats * _BEAT_POLLS * POLL_S:.0f} s"
                return self._status_store.publish(Loss(member.rank, reason))
        return None

    def _find_hang(self, before: dict[int, Standing | None]) -> Loss | None:
        """Return the rank that is furthest behind in a run where none makes progress."""
        now = {**self._beats, 0: self._progress.standing(self._polls)}
        self._beats[0] = now[0]
        has_moved = any(
            beat is not None and ((old := before.get(rank)) is None or old.marks != beat.marks)
            for rank, beat in now.items()
        )
        self._stalled = 0 if has_moved else self._stalled + 1
        if self._stalled * _BEAT_POLLS * POLL_S < self._limits.hang_s:
            return None
        behind = min((beat.position, rank) for rank, beat in now.items() if beat is not None)[1]
        standing = now[behind]
        assert standing is not None
        reason = (
            f"no rank has made progress for {self._limits.hang_s:.0f} s (--hang_timeout_s); "
            f"{self._members[behind]} is {standing}"
        )
        return self._status_store.publish(Loss(behind, reason, is_hang=True))

    def _find_dead_without_store(self) -> Loss | None:
        dead = [member for member in self._near if not self._alive(member)]
        if dead:
            return Loss(dead[0].rank, _GONE)
        if self._failures < _STORE_POLLS:
            return None
        return STORE_LOSS
