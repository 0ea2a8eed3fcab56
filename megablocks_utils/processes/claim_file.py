"""The claim of an output folder: a small file that says which live run writes there.

Torch-free. On its own machine a run is known by its process; from elsewhere by a counter in the
file, which a live run counts up. No two machines' clocks are compared.
"""

import json
import os
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes.liveness import Member, describe_self, is_alive

__all__ = ["CLAIM_NAME", "Claim", "build_claim", "describe_holder", "is_held_here", "is_same_run"]
__all__ += ["read_claim", "remove_claim", "update_claim", "wait_until_free", "write_claim"]

CLAIM_NAME = ".claim.json"
_SILENT_S = 45.0
"""A run elsewhere that has not counted up for so long is dead."""

_MAX_BYTES = 4096
_UNFINISHED_S = 2.0  # how long the file of a claim that is being made may be empty
_LOCKED_S = 10.0
_LOCK_POLL_S = 0.02
_POLL_S = 0.5
_COUNT_DIGITS = 12


@dataclass(frozen=True)
class Claim:
    """What a run writes into its claim.

    Attributes:
        key: Of this claim alone.
        host: Name of the machine, for messages.
        machine: Equal for processes that see each other's process ids.
        pid: Of the process that writes.
        started: When it started, so that a reused id is told apart.
        run_id: Of the launcher's start; empty without torchrun.
        agent: Of the launcher's process on this machine; likewise.
        state: "live", or "over" where the process has said that it ends.
        beat: A counter.
    """

    key: str = ""
    host: str = ""
    machine: str = ""
    pid: int = 0
    started: str = ""
    run_id: str = ""
    agent: str = ""
    state: str = "over"
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def as_bytes(self) -> bytes:
        """Return the file's content, as long for every count and state."""
        record = asdict(self) | {"beat": f"{self.beat:0{_COUNT_DIGITS}d}"}
        return json.dumps(record | {"state": f"{self.state:4}"}).encode() + b"\n"


def build_claim(environ: Mapping[str, str]) -> Claim:
    """Return a claim of this process.

    The launcher's run id alone is often "none"; its error files lie in a folder that every agent
    makes for itself.
    """
    me = describe_self(0)
    agent = environ.get("TORCHELASTIC_ERROR_FILE", "").partition("/attempt_")[0]
    run_id = environ.get("TORCHELASTIC_RUN_ID", "")
    return Claim(
        key=uuid.uuid4().hex,
        host=me.host,
        machine=me.machine,
        pid=me.pid,
        started=me.started,
        run_id=run_id,
        agent=agent if run_id else "",
        state="live",
    )


def read_claim(folder: Path) -> Claim | None:
    """Return the claim of a folder; None where there is none that can be read."""
    return _read(folder)[0]


def write_claim(folder: Path, claim: Claim) -> bool:
    """Write the claim of a folder that has none; return False where it has one.

    Raises:
        OSError: The folder cannot be written.
    """
    path = folder / CLAIM_NAME
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(claim.as_bytes())
    # Where a mount does not know exclusive creation, the last of two writers has it.
    found = read_claim(folder)
    return found is not None and found.key == claim.key


def update_claim(folder: Path, claim: Claim) -> bool:
    """Overwrite a claim in place; return False if the folder holds another one.

    Raises:
        OSError: It is not there, or cannot be written.
    """
    path = folder / CLAIM_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = _parse(os.pread(descriptor, _MAX_BYTES, 0))
        if found is not None and found.key != claim.key:
            return False
        os.pwrite(descriptor, claim.as_bytes(), 0)
        return True
    finally:
        os.close(descriptor)


def remove_claim(folder: Path, claim: Claim | None, successor: Claim | None = None) -> bool:
    """Remove a claim, unless another one has taken its place; write its successor, if any.

    Args:
        folder: The output folder.
        claim: What was found there; None for a file that holds none.
        successor: The claim that this run wants instead.

    Returns:
        Whether the folder has the successor's claim.

    Raises:
        OSError: The folder cannot be written.
    """
    with _alone(folder):
        found = read_claim(folder)
        if (found and found.key) == (claim and claim.key):
            (folder / CLAIM_NAME).unlink(missing_ok=True)
        return successor is not None and write_claim(folder, successor)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep others from removing claims meanwhile: several may have found the same dead one."""
    path = folder / f"{CLAIM_NAME}.lock"
    last_s = time.monotonic() + _LOCKED_S
    while True:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644))
            break
        except FileExistsError:
            if time.monotonic() > last_s:  # it is held for milliseconds: its holder was killed
                path.unlink(missing_ok=True)
            time.sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def is_held_here(claim: Claim | None) -> bool:
    """Return whether another process of this machine, that is alive, has the claim."""
    me = describe_self(0)
    if claim is None or claim.state != "live" or claim.machine != me.machine:
        return False
    holder = Member(0, claim.host, claim.machine, claim.pid, claim.started)
    return holder != me and is_alive(holder)


def is_same_run(claim: Claim | None, environ: Mapping[str, str]) -> bool:
    """Return whether an earlier attempt of the same start of torchrun has made the claim.

    On one machine the agent tells: it runs one group of processes at a time. Elsewhere, where every
    machine has an agent of its own, only the run's id and a count of restarts are known.
    """
    mine = build_claim(environ)
    if claim is None or not mine.run_id or claim.run_id != mine.run_id:
        return False
    is_restart = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if claim.host != mine.host:
        return is_restart
    is_other = (claim.pid, claim.started) != (mine.pid, mine.started)
    return claim.agent == mine.agent and (is_restart or (bool(mine.agent) and is_other))


def wait_until_free(folder: Path, environ: Mapping[str, str]) -> Claim | None:
    """Return the claim that is in the way of this run, once it is known to be dead.

    Raises:
        ConfigurationError: It is alive.
        OSError: The folder cannot be written.
    """
    claim, changed_s = _read(folder)
    last_s = time.monotonic() + _UNFINISHED_S
    while claim is None and changed_s and time.monotonic() < last_s:
        time.sleep(_POLL_S)
        claim, changed_s = _read(folder)
    mine = build_claim(environ)
    is_over = claim is None or claim.state != "live" or is_same_run(claim, environ)
    if claim is None or is_over or (claim.pid, claim.started) == (mine.pid, mine.started):
        return claim
    is_held = is_held_here(claim)
    if not is_held and claim.machine != mine.machine:
        is_held = _is_counting(folder, claim, _age_s(folder, changed_s))
    if is_held:
        raise ConfigurationError(describe_holder(folder, claim))
    return claim


def describe_holder(folder: Path | str, claim: Claim) -> str:
    """Say that a run that is alive has the folder."""
    return (
        f"--output_dir is {folder}, but another run, {claim}, is writing there; wait for its end, "
        "stop it, or choose another folder."
    )


def _is_counting(folder: Path, claim: Claim, age_s: float) -> bool:
    """Return whether a run elsewhere counts up its claim before it has been silent for too long."""
    last_s = time.monotonic() + _SILENT_S - age_s
    while time.monotonic() < last_s:
        time.sleep(_POLL_S)
        now = read_claim(folder)
        if now is None or now.key != claim.key or now.state != "live":
            return False
        if now.beat != claim.beat:
            return True
    return False


def _age_s(folder: Path, changed_s: float) -> float:
    """Return how long ago a file was written, by the clock of the file system alone."""
    trial = folder / f"{CLAIM_NAME}.{uuid.uuid4().hex}"
    trial.touch()
    try:
        return trial.stat().st_mtime - changed_s
    finally:
        trial.unlink(missing_ok=True)


def _read(folder: Path) -> tuple[Claim | None, float]:
    """Return the claim and when it was last written; 0 where there is no regular file."""
    try:
        # Opening asks a server anew; a link or a pipe is no claim.
        path = folder / CLAIM_NAME
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None, 0.0
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None, 0.0
        return _parse(os.read(descriptor, _MAX_BYTES)), status.st_mtime
    except OSError:
        return None, 0.0
    finally:
        os.close(descriptor)


def _parse(content: bytes) -> Claim | None:
    try:
        record = json.loads(content)
        values: dict[str, Any] = {f.name: str(record.get(f.name, "")) for f in fields(Claim)}
        values |= {name: int(values[name] or 0) for name in ("pid", "beat")}
        claim = Claim(**values)
    except (ValueError, AttributeError, RecursionError):
        return None
    return replace(claim, state=claim.state.strip() or "over")
