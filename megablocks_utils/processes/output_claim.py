"""Take the output folder for one run: claimed, seen by all hosts, and cleared."""

import os
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megablocks_utils.config import RunConfig
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.processes.agreement import broadcast_from_rank0, gather_from_all_ranks
from megablocks_utils.processes.claim_file import (
    build_claim,
    read_claim,
    remove_claim,
    update_claim,
    wait_until_free,
    write_claim,
)
from megablocks_utils.processes.output_folder import (
    check_output_dir,
    choose_checkpoint,
    clear_output_dir,
)

__all__ = ["OutputClaim", "claim_output_dir"]

_BEAT_S = 5.0
_JOIN_S = 5.0
_TRIES = 20
_SHARED_S = 10.0  # how long a host may take to see what another has written
_POLL_S = 0.2


class OutputClaim:
    """Hold the claim of an output folder, and count it up in a thread; rank 0 only.

    Args:
        folder: The output folder, which must be there.
        environ: The launcher's.

    Raises:
        ConfigurationError: Another run that is alive has it.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str] = os.environ) -> None:
        self._folder = folder
        self._claim = build_claim(environ)
        self._taken_by = ""
        self._ended = threading.Event()
        for _ in range(_TRIES):
            if write_claim(folder, self._claim):
                break
            if remove_claim(folder, wait_until_free(folder, environ), self._claim):
                break
        else:
            raise ConfigurationError(f"--output_dir is {folder}, but other runs start there too.")
        self._thread = threading.Thread(target=self._count, name="output claim", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Refuse to write on once another run has taken the folder over.

        Raises:
            CheckpointError: naming it.
        """
        if self._taken_by:
            raise CheckpointError(
                f"{self._folder} was taken over by another run, {self._taken_by}, to which this "
                "one seemed dead; what it had written until then is kept."
            )

    def release(self, *, is_done: bool) -> None:
        """End the claim.

        Args:
            is_done: Whether the run has ended well; else the launcher may restart it, which the
                file must tell from a run that is new.
        """
        self._ended.set()
        self._thread.join(_JOIN_S)  # it may wait for a server that is gone
        with suppress(OSError):  # nothing but the claim is lost with the folder
            if is_done:
                remove_claim(self._folder, self._claim)
            else:
                update_claim(self._folder, replace(self._claim, state="over"))

    def _count(self) -> None:
        while not self._ended.wait(_BEAT_S):
            self._claim = replace(self._claim, beat=self._claim.beat + 1)
            try:
                is_mine = update_claim(self._folder, self._claim)
            except FileNotFoundError:
                with suppress(OSError):
                    write_claim(self._folder, self._claim)
                continue
            except OSError:
                continue  # the run's own writing says what is wrong with the disk
            if not is_mine:
                self._taken_by = str(read_claim(self._folder))
                return


def claim_output_dir(
    config: RunConfig, environ: Mapping[str, str] = os.environ
) -> OutputClaim | None:
    """Take the output folder: check and make it, claim it, and remove what an earlier run left.

    Called once data and model are known to be good, just before the first write. A run that is
    refused leaves everything as it was.

    **Collective:** every rank must call.

    Returns:
        The claim, on rank 0; None elsewhere.

    Raises:
        ConfigurationError: on every rank, as `check_output_dir`; and where another live run has the
            folder, or a host does not see what rank 0 writes there.
    """
    claims: list[OutputClaim] = []
    made: list[Path] = []

    def claim() -> Path | None:
        folder = check_output_dir(config, environ)
        made.extend(_make(folder))
        try:
            chosen = choose_checkpoint(config, environ)  # while an earlier attempt's claim is there
            claims.append(OutputClaim(folder, environ))
        except OSError as error:
            raise _not_writable(folder, error) from error
        return chosen

    is_done = False
    try:
        chosen = broadcast_from_rank0(claim)
        _check_shared(Path(config.output_dir))
        broadcast_from_rank0(lambda: _clear(config, chosen))
        is_done = True
    finally:
        for held in [] if is_done else claims:
            held.release(is_done=True)
        _unmake([] if is_done else made)
    return claims[0] if claims else None


def _clear(config: RunConfig, chosen: Path | None) -> None:
    try:
        clear_output_dir(config, chosen)
    except OSError as error:
        raise _not_writable(Path(error.filename or config.output_dir), error) from error


def _not_writable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"cannot write {path}: {error.strerror or error}.")


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; return the ones that were not there, the deepest first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _unmake(missing)
        raise ConfigurationError(
            f"--output_dir is {folder}, but it cannot be made ({error.strerror})."
        ) from error
    return missing


def _unmake(made: list[Path]) -> None:
    for path in made:
        with suppress(OSError):  # not there, or no longer empty
            path.rmdir()


def _check_shared(folder: Path) -> None:
    """Refuse a folder that is not one and the same on all hosts: all write there.

    **Collective:** every rank must call.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    token = folder / f".shared-{uuid.uuid4().hex}"

    def write() -> tuple[Path, str]:
        try:
            token.touch()
        except OSError as error:
            raise _not_writable(folder, error) from error
        return token, os.uname().nodename

    try:
        seen, host = broadcast_from_rank0(write)
        blind = gather_from_all_ranks(lambda: "" if _sees(seen) else os.uname().nodename)
    finally:
        with suppress(OSError):
            token.unlink(missing_ok=True)
    names = sorted({name for name in blind if name})
    if names:
        raise ConfigurationError(
            f"--output_dir is {folder}, but {join_words(names, 'and')} "
            f"{'does' if len(names) == 1 else 'do'} not see what rank 0 on {host} writes there; "
            "all hosts write their parts of a checkpoint into one folder, so it must be one that "
            "they share."
        )


def _sees(token: Path) -> bool:
    """Return whether a file that another host has written is seen here, within some seconds.

    Its name is new, so that no cache of the file system has an answer; for a folder that was not
    there a moment ago, trying to make it asks the server.
    """
    folder = token.parent
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    last_s = time.monotonic() + _SHARED_S
    while not token.exists() and time.monotonic() < last_s:
        time.sleep(_POLL_S)
    is_seen = token.exists()
    if not is_seen:
        _unmake(missing)
    return is_seen
