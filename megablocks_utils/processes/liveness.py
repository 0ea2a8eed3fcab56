"""Lost ranks: every rank watches the others, and ends when one of them is gone.

Torch-free: the store is handed in. A process on the same machine is watched by its process id, so
one that is busy or suspended for minutes is not lost. One elsewhere is watched by a counter in the
store: rank 0 watches all of them, the others watch rank 0 and the verdict.
"""

import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

__all__ = [
    "POLL_S",
    "STORE_LOSS",
    "StatusStore",
    "Loss",
    "Member",
    "Store",
    "Watch",
    "describe_self",
    "is_alive",
]

POLL_S = 1.0
_BEAT_POLLS = 3  # polls between two beats
_SILENT_BEATS = 15  # beats in a row that may be missed: 45 s
_GONE = "its process is gone"
_STORE_POLLS = 3  # polls that the store may fail, for the process ids to tell who is gone


@dataclass(frozen=True)
class Member:
    """The process of a rank.

    Attributes:
        rank: Among all.
        host: Name of its machine, for messages.
        machine: Equal for processes that see each other's process ids.
        pid: Its process id there.
        started: When it started, in ticks of its machine, so that a reused id is told apart.
    """

    rank: int
    host: str
    machine: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


@dataclass(frozen=True)
class Loss:
    """A rank that was lost, and why.

    Attributes:
        rank: The lost one; None where only the store is known to be gone.
        reason: What happened to it, as a part of a sentence.
        grace_s: How long the others may still end in their own way.
    """

    rank: int | None
    reason: str
    grace_s: float = 0.0


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


class Store(Protocol):
    """The part of a `torch.distributed` store that is used here."""

    def set(self, key: str, value: str, /) -> None:
        """Set a key."""

    def get(self, key: str, /) -> bytes:
        """Return the value of a key that is there."""
        ...

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Return the values of keys that are there."""
        ...

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter, and return its new value."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Return whether all keys are there."""
        ...

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Set a key that holds `expected` (empty: that is not there); return what it holds now."""
        ...


class StatusStore:
    """What ranks tell each other in the store.

    Args:
        store: for this use only, with a client of its own: one that waits elsewhere holds its lock.
            Every method may raise RuntimeError when it is gone.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def beat(self, rank: int, count: int) -> None:
        """Give a sign of life."""
        self._store.set(f"beat/{rank}", str(count))

    def read_beats(self, ranks: Sequence[int]) -> list[bytes]:
        """Return the counters of ranks that have all beaten once."""
        return self._store.multi_get([f"beat/{rank}" for rank in ranks]) if ranks else []

    def leave(self, rank: int) -> int:
        """Note that a rank ends as it should, and return how many have done so."""
        self._store.set(f"left/{rank}", "1")
        # It also waits for the store's answer: after it, all ranks can see the first.
        return self._store.add("left", 1)

    def count_left(self) -> int:
        """Return how many ranks have left."""
        return self._store.add("left", 0)

    def has_left(self, rank: int) -> bool:
        """Return whether a rank has ended as it should."""
        return self._store.check([f"left/{rank}"])

    def publish(self, loss: Loss) -> Loss:
        """Publish a verdict, and return the first that any rank has published."""
        return Loss(**json.loads(self._store.compare_set("verdict", "", json.dumps(asdict(loss)))))

    def read_verdict(self) -> Loss | None:
        """Return the verdict, or None."""
        if not self._store.check(["verdict"]):
            return None
        return Loss(**json.loads(self._store.get("verdict")))

    def claim_reporter(self) -> bool:
        """Claim to be the one rank that reports the loss; return whether this was the first."""
        return self._store.add("reporter", 1) == 1

    def has_reporter(self) -> bool:
        """Return whether some rank has claimed to report the loss."""
        return self._store.add("reporter", 0) > 0


class Watch:
    """Decide, poll by poll, whether a rank is lost.

    It counts polls, not seconds: a rank that was suspended for a while must not take the others for
    silent.

    Args:
        members: all ranks, in their order.
        rank: this one.
        status_store: of the run.
        alive: returns whether a process of this machine is there.
    """

    def __init__(
        self,
        members: Sequence[Member],
        rank: int,
        status_store: StatusStore,
        alive: Callable[[Member], bool] = is_alive,
    ) -> None:
        self._me, self._members, self._status_store, self._alive = (
            members[rank],
            members,
            status_store,
            alive,
        )
        others = [member for member in members if member.rank != rank]
        self._near = [member for member in others if self._is_near(member)]
        far = [member for member in others if not self._is_near(member)]
        self._far = far if rank == 0 else [member for member in far if member.rank == 0]
        self._beats: dict[int, bytes] = {}
        self._silent = dict.fromkeys((member.rank for member in self._far), 0)
        self._polls = self._failures = 0

    def look(self) -> Loss | None:
        """Check all ranks once; call it every `POLL_S`.

        Returns:
            The verdict; None while no rank is lost.
        """
        try:
            loss = self._status_store.read_verdict()
            if loss is None and self._polls % _BEAT_POLLS == 0:
                self._status_store.beat(self._me.rank, self._polls)
                loss = self._find_silent()
            loss = loss or self._find_dead()
            self._failures = 0
        except RuntimeError:
            self._failures += 1
            return self._find_dead_without_store()
        finally:
            self._polls += 1
        return loss

    def is_first_reporter(self, loss: Loss) -> bool:
        """Return whether this is the lowest rank that is left, which reports the loss."""
        below = self._members[: self._me.rank]
        for member in below:
            if member.rank == loss.rank:
                continue
            if self._is_near(member):
                gone = not self._alive(member)
            else:  # the store is on rank 0's machine
                gone = loss.rank is None and member.machine == self._members[0].machine
            if not gone:
                return False
        return True

    def _is_near(self, member: Member) -> bool:
        return member.machine == self._me.machine

    def _find_dead(self) -> Loss | None:
        for member in [member for member in self._near if not self._alive(member)]:
            if self._status_store.has_left(member.rank):
                self._near.remove(member)
            else:
                return self._status_store.publish(Loss(member.rank, _GONE))
        return None

    def _find_silent(self) -> Loss | None:
        ranks = [member.rank for member in self._far]
        for rank, beat in zip(ranks, self._status_store.read_beats(ranks), strict=True):
            self._silent[rank] = self._silent[rank] + 1 if self._beats.get(rank) == beat else 0
            self._beats[rank] = beat
        for member in [m for m in self._far if self._silent[m.rank] >= _SILENT_BEATS]:
            if self._status_store.has_left(member.rank):
                self._far.remove(member)
            else:
                silent_s = _SILENT_BEATS * _BEAT_POLLS * POLL_S
                reason = f"no sign of life for {silent_s:.0f} s"
                return self._status_store.publish(Loss(member.rank, reason))
        return None

    def _find_dead_without_store(self) -> Loss | None:
        dead = [member for member in self._near if not self._alive(member)]
        if dead:
            return Loss(dead[0].rank, _GONE)
        if self._failures < _STORE_POLLS:
            return None
        return STORE_LOSS
