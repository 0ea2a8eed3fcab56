"""What the ranks of a run tell each other in the launcher's store, and who they are.

Torch-free: the store is handed in. It listens to whoever reaches its port, so from
`authenticate` on every word carries a code that only ranks of this run can make.
"""

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

__all__ = ["Loss", "Member", "Standing", "StatusStore", "Store"]

_UNSIGNED = "-"
_PUBLISH_TRIES = 5


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
    """A rank that was lost, or a run that hangs, and why.

    Attributes:
        rank: The lost one, or the one furthest behind; None where only the store is known to be
            gone.
        reason: What happened, as a part of a sentence.
        grace_s: How long the others may still end in their own way.
        is_hang: Whether all ranks are there and none makes progress.
    """

    rank: int | None
    reason: str
    grace_s: float = 0.0
    is_hang: bool = False


@dataclass(frozen=True)
class Standing:
    """A sign of life: where a rank is.

    Attributes:
        count: Changes with every sign.
        marks: Changes with every progress.
        step: Optimizer steps done; None before the first.
        micro_batches: Begun since.
        phase: What it does, as a part of a sentence.
    """

    count: int
    marks: int = 0
    step: int | None = None
    micro_batches: int = 0
    phase: str = "starting"

    @property
    def position(self) -> tuple[int, int]:
        """What tells which of two ranks is further."""
        return (-1 if self.step is None else self.step, self.micro_batches)

    def __str__(self) -> str:
        if self.step is None:
            return f"{self.phase}, before its first step"
        begun = f" and {self.micro_batches} micro-batches" if self.micro_batches else ""
        return f"{self.phase}, after step {self.step}{begun}"


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
        self._secret = b""

    def authenticate(self, secret: bytes) -> None:
        """Sign every word from now on, and believe only what is signed.

        Args:
            secret: that all ranks of the run have, and nobody else.
        """
        self._secret = secret

    def beat(self, rank: int, standing: Standing) -> None:
        """Give a sign of life."""
        self._set(f"beat/{rank}", json.dumps(asdict(standing)))

    def read_beats(self, ranks: Sequence[int]) -> list[Standing | None]:
        """Return the last sign of each rank; None for one that has not given any."""
        keys = [f"beat/{rank}" for rank in ranks]
        if not keys:
            return []
        # It waits for keys that are not there.
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        values = dict(zip(keys, self._store.multi_get(keys) if keys else [], strict=True))
        texts = [self._open(key, values.get(key)) for key in (f"beat/{rank}" for rank in ranks)]
        return [None if text is None else Standing(**json.loads(text)) for text in texts]

    def leave(self, rank: int) -> int:
        """Note that a rank ends as it should, and return how many have done so."""
        self._set(f"left/{rank}", "left")
        # It also waits for the store's answer: after it, all ranks can see the first.
        return self._store.add("left", 1)

    def count_left(self) -> int:
        """Return how many ranks have left."""
        return self._store.add("left", 0)

    def has_left(self, rank: int) -> bool:
        """Return whether a rank has ended as it should."""
        return self._get(f"left/{rank}") is not None

    def publish(self, loss: Loss) -> Loss:
        """Publish a verdict, and return the first that any rank has published."""
        return Loss(**json.loads(self._claim("verdict", json.dumps(asdict(loss)))))

    def read_verdict(self) -> Loss | None:
        """Return the verdict, or None."""
        text = self._get("verdict")
        return None if text is None else Loss(**json.loads(text))

    def claim_reporter(self, member: Member) -> bool:
        """Claim to be the rank of its machine that reports the loss; return whether it is."""
        return self._claim(f"reporter/{member.machine}", str(member.rank)) == str(member.rank)

    def has_reporter(self, machine: str) -> bool:
        """Return whether some rank of a machine has claimed to report the loss."""
        return self._get(f"reporter/{machine}") is not None

    def _set(self, key: str, text: str) -> None:
        self._store.set(key, self._seal(key, text))

    def _get(self, key: str) -> str | None:
        return self._open(key, self._store.get(key)) if self._store.check([key]) else None

    def _claim(self, key: str, text: str) -> str:
        """Set a key that no rank has set, and return what it holds then."""
        expected = ""
        for _ in range(_PUBLISH_TRIES):
            holder = self._store.compare_set(key, expected, self._seal(key, text))
            found = self._open(key, holder)
            if found is not None:
                return found
            expected = holder.decode(errors="replace")  # of a stranger
        return text

    def _seal(self, key: str, text: str) -> str:
        return f"{self._code(key, text)} {text}"

    def _open(self, key: str, value: bytes | None) -> str | None:
        """Return the text; None for what no rank of this run has written."""
        if value is None:
            return None
        code, _, text = value.decode(errors="replace").partition(" ")
        if self._secret and not hmac.compare_digest(code, self._code(key, text)):
            return None
        return text

    def _code(self, key: str, text: str) -> str:
        if not self._secret:
            return _UNSIGNED
        return hmac.new(self._secret, f"{key} {text}".encode(), hashlib.sha256).hexdigest()
