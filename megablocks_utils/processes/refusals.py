"""Processes that end before the run has begun tell those that wait for them why.

Torch-free: the store is handed in.
"""

import json
import time
import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass

from megablocks_utils.processes.status_store import Member, Store

__all__ = ["LAST_LOOK_S", "Refusal", "RefusalReader", "announce"]

_ANNOUNCE_S = 30.0  # how long a refused process waits for those that are to know
_REPEAT_S = 2.0  # who comes to the store later takes only what is said again for news
_KNOWN_S = 5.0  # how long a process that knows waits for the others
_POLL_S = 0.1
LAST_LOOK_S = 0.5  # and how long it leaves them for their last look into the store


@dataclass(frozen=True)
class Refusal:
    """A process that ended before the run began.

    Attributes:
        key: its own.
        member: which process it is.
        covers: ranks that end with it: those of its machine, or itself.
        reason: the sentence it ended with.
    """

    key: str
    member: Member
    covers: int
    reason: str


def announce(store: Store, member: Member, reason: str, *, covers: int, world_size: int) -> None:
    """Publish why this process ends, and wait until all others know, or end themselves.

    This process may be the one that the store ends with.

    Args:
        store: of the launcher.
        member: this process.
        reason: the sentence it ends with.
        covers: ranks that end with it.
        world_size: of the run.

    Raises:
        RuntimeError: the store has gone.
    """
    refusal = Refusal(uuid.uuid4().hex, member, covers, reason)
    # What an earlier start has left may stand for a machine, which then learns nothing: it waits
    # for this process as for one that was killed.
    reader = RefusalReader(store, also_old=True)
    refused: dict[str, dict[int, int]] = {}
    last_s, said_s = time.monotonic() + _ANNOUNCE_S, 0.0
    while (now_s := time.monotonic()) < last_s:
        if now_s - said_s >= _REPEAT_S:
            said_s = now_s
            _publish(store, refusal)
        while (found := reader.read_new()) is not None:
            refused.setdefault(found.member.machine, {})[found.member.rank] = found.covers
        num_refused = sum(max(len(ranks), *ranks.values()) for ranks in refused.values())
        if num_refused + store.add(f"known/{refusal.key}", 0) >= world_size:
            return
        time.sleep(_POLL_S)


def _publish(store: Store, refusal: Refusal) -> None:
    number = store.add("refusals", 1)
    store.set(f"refusal/{number}", json.dumps(asdict(refusal)))


class RefusalReader:
    """Read what is published from now on; what stands there may be of an earlier start.

    Args:
        store: of the launcher.
        also_old: whether to read that too.
    """

    def __init__(self, store: Store, *, also_old: bool = False) -> None:
        self._store = store
        self._num_old = store.add("refusals", 0)
        self._num_read = 0 if also_old else self._num_old

    def read_new(self) -> Refusal | None:
        """Return the next refusal; None where there is none."""
        if self._store.add("refusals", 0) <= self._num_read:
            return None
        refusal = self._read(self._num_read + 1)
        if refusal is not None:
            self._num_read += 1
        return refusal

    def find_old(self, ranks: Collection[int]) -> Refusal | None:
        """Return what one of these ranks said before this process came, or None.

        For ranks that have not come long after: then it is of this start.
        """
        for number in range(self._num_old, 0, -1):
            refusal = self._read(number)
            if refusal is not None and refusal.member.rank in ranks:
                return refusal
        return None

    def acknowledge(self, refusal: Refusal, world_size: int) -> None:
        """Tell that this process knows; wait a little for all to know: the store may go with it."""
        last_s = time.monotonic() + _KNOWN_S
        known = self._store.add(f"known/{refusal.key}", 1)
        while known + refusal.covers < world_size and time.monotonic() < last_s:
            time.sleep(_POLL_S)
            known = self._store.add(f"known/{refusal.key}", 0)
        time.sleep(LAST_LOOK_S)

    def _read(self, number: int) -> Refusal | None:
        key = f"refusal/{number}"
        if not self._store.check([key]):
            return None  # counted, and not yet there
        values = json.loads(self._store.get(key))
        return Refusal(**values | {"member": Member(**values["member"])})
