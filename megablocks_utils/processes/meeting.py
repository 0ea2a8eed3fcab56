"""How the processes of a run meet in the launcher's store, before there is a process group.

Torch-free: the store is handed in. The store may hold what an earlier start of this run has left,
and no number that the launcher gives tells one start from the next on all machines: a new machine
counts its restarts from 0. So rank 0 draws a name for every meeting, and all keys are under it.
"""

import json
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes.refusals import LAST_LOOK_S, Refusal, RefusalReader
from megablocks_utils.processes.status_store import Member, Store

__all__ = ["Arrival", "Meeting"]

_POLLS_S = (0.05, 1.0)  # between two looks: at first, and at most
_NOTICE_S = 30.0  # after it, those who wait say for whom
_STRANGER_S = 25.0  # how long a meeting that is not this rank's may stay the current one
_ALL_READ_S = 8.0  # how long an error waits for the others to read the same
_MAX_NAMED = 16


@dataclass(frozen=True)
class Arrival:
    """What a process says of itself when it comes.

    Attributes:
        member: which process it is.
        world_size: of the run, as it was told.
        address: of its machine, as others reach it; empty where it does not know.
        device: what it computes on, for people.
        digest: of its facts.
        device_uuid: tells its GPU from all others; empty on a CPU.
    """

    member: Member
    world_size: int
    address: str
    device: str
    digest: str
    device_uuid: str = ""

    def as_text(self) -> str:
        """Return it as the store holds it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: bytes) -> "Arrival":
        """Return what `as_text` returned."""
        values = json.loads(text)
        return cls(**values | {"member": Member(**values["member"])})


class Meeting:
    """Wait in the store until all processes have come.

    Args:
        store: of the launcher.
        me: this process.
        facts: what must be the same on all ranks, by name; their digest is in `me`.
        reports: whether this process says for whom it waits.

    Attributes:
        name: of the meeting that this process has come to; empty before.
        is_known_to_all: whether what `wait` raises, or the caller finds, is raised on all ranks.
    """

    def __init__(
        self, store: Store, me: Arrival, facts: Mapping[str, str], *, reports: bool
    ) -> None:
        self._store, self._me, self._facts, self._reports = store, me, dict(facts), reports
        self._rank, self._world_size = me.member.rank, me.world_size
        self._refusals = RefusalReader(store)
        self._stranger = ""
        self._stranger_since_s = 0.0
        self.name = ""
        self.is_known_to_all = False

    def wait(self, limit_s: float) -> list[Arrival]:
        """Wait for all ranks, and return what they say of themselves, in their order.

        **Collective:** all ranks must call it.

        Args:
            limit_s: how long.

        Raises:
            ConfigurationError: a process was refused, or has not come within the limit.
            RuntimeError: the store has gone.
        """
        started_s, pause_s, has_told = time.monotonic(), _POLLS_S[0], False
        while True:
            self._raise_refusal(self._refusals.read_new())
            self._join()
            if self._is_complete():
                self.is_known_to_all = True
                return self._read_arrivals()
            self._check_stranger()
            waited_s = time.monotonic() - started_s
            if waited_s > limit_s:
                raise ConfigurationError(f"{self._describe_missing()} within {limit_s:.0f} s.")
            if waited_s > _NOTICE_S and not has_told:
                has_told = True
                self._raise_refusal(self._refusals.find_old(self._find_missing()))
                self._tell(f"{self._describe_missing()} for {waited_s:.0f} s; waiting")
            time.sleep(pause_s)
            pause_s = min(_POLLS_S[1], 1.2 * pause_s)

    def read_facts(self, rank: int) -> dict[str, str]:
        """Return the facts of a rank, once all have come."""
        facts: dict[str, str] = json.loads(self._store.get(f"{self.name}/facts/{rank}"))
        return facts

    def wait_until_read(self) -> None:
        """Wait until all ranks have read the same, before an error: the store may go with one."""
        last_s = time.monotonic() + _ALL_READ_S
        count = self._store.add(f"{self.name}/read", 1)
        while count < self._world_size and time.monotonic() < last_s:
            time.sleep(_POLLS_S[0])
            count = self._store.add(f"{self.name}/read", 0)
        time.sleep(LAST_LOOK_S)

    def _join(self) -> None:
        """Come to the current meeting, unless this process has."""
        if self._rank == 0:
            if not self.name:
                self._register(uuid.uuid4().hex)
                self._store.set("current", json.dumps([self.name, self._me.as_text()]))
            return
        if not self._store.check(["current"]):
            return
        name, text = json.loads(self._store.get("current"))
        if name == self.name:
            return
        host = Arrival.from_text(text)
        if host.world_size != self._world_size:
            self._note_stranger(
                f"WORLD_SIZE is {self._world_size}, but {host.member}, which it meets at "
                f"MASTER_ADDR and MASTER_PORT, was started with {host.world_size}"
            )
        else:
            self._register(name)

    def _register(self, name: str) -> None:
        """Take this rank's place; another process may have it, in a meeting that is over."""
        text = self._me.as_text()
        holder = self._store.compare_set(f"{name}/rank/{self._rank}", "", text)
        if holder != text.encode():
            other = Arrival.from_text(holder).member
            self._note_stranger(
                f"RANK is {self._rank}, but the process {other.pid} on {other.host} has that rank"
            )
            return
        self.name, self._stranger = name, ""
        self._store.set(f"{name}/facts/{self._rank}", json.dumps(self._facts))
        self._store.add(f"{name}/count", 1)

    def _is_complete(self) -> bool:
        if not self.name:
            return False
        if self._rank == 0 and self._store.add(f"{self.name}/count", 0) == self._world_size:
            self._store.set(f"{self.name}/complete", "1")
        return self._store.check([f"{self.name}/complete"])

    def _read_arrivals(self) -> list[Arrival]:
        keys = [f"{self.name}/rank/{rank}" for rank in range(self._world_size)]
        return [Arrival.from_text(text) for text in self._store.multi_get(keys)]

    def _raise_refusal(self, refusal: Refusal | None) -> None:
        if refusal is None:
            return
        self._refusals.acknowledge(refusal, self._world_size)
        self.is_known_to_all = True
        raise ConfigurationError(f"{refusal.member} ended before the run began: {refusal.reason}")

    def _note_stranger(self, reason: str) -> None:
        if not self._stranger:
            self._stranger_since_s = time.monotonic()
        self._stranger = reason

    def _check_stranger(self) -> None:
        if self._stranger and time.monotonic() - self._stranger_since_s > _STRANGER_S:
            raise ConfigurationError(f"{self._stranger}; every process needs a place of its own.")

    def _tell(self, line: str) -> None:
        if self._reports:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def _find_missing(self) -> list[int]:
        ranks = range(self._world_size)
        if not self.name:
            return [0]
        return [rank for rank in ranks if not self._store.check([f"{self.name}/rank/{rank}"])]

    def _describe_missing(self) -> str:
        """Return who has not come, and who is here, as the beginning of a sentence."""
        missing = self._find_missing()
        named = [*map(str, missing[:_MAX_NAMED]), *(["others"] if missing[_MAX_NAMED:] else [])]
        ranks = "rank" if len(missing) == 1 else "ranks"
        has = "has" if len(missing) == 1 else "have"
        here = sorted(set(range(self._world_size)) - set(missing)) if self.name else []
        arrivals = [self._store.get(f"{self.name}/rank/{rank}") for rank in here]
        hosts = Counter(Arrival.from_text(text).member.host for text in arrivals)
        found = [f"{count} on {host}" for host, count in hosts.items()]
        present = f" ({join_words(found, 'and')} here)" if found else ""
        return (
            f"{ranks} {join_words(named, 'and')} of {self._world_size} ranks{present} {has} not "
            "come to MASTER_ADDR and MASTER_PORT"
        )
