"""Write a checkpoint folder of a run under another name, and rename it when it is complete.

While it is written the folder is `checkpoint-<step>.incomplete`. The manifest is its last file, and
the rename to `checkpoint-<step>` comes when all of it is on disk. So a folder of that name is
complete, whatever happens at whatever time.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megablocks_utils.checkpoint.distributed_checkpoint import write_shards
from megablocks_utils.checkpoint.manifest import describe_file, write_manifest
from megablocks_utils.checkpoint.tensor_shards import TensorShard
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import sync_to_disk
from megablocks_utils.processes.agreement import broadcast_from_rank0, gather_from_all_ranks
from megablocks_utils.processes.output_folder import (
    CHECKPOINT_PREFIX,
    INCOMPLETE_SUFFIX,
    LATEST_NAME,
    find_checkpoints,
    remove_checkpoint,
)

__all__ = ["Snapshot", "delete_beyond", "write_checkpoint"]

_FILE_OF_RANK = re.compile(r"(?:__|rng-)(\d+)")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Snapshot:
    """Hold what one rank contributes to a checkpoint.

    Attributes:
        step: optimizer steps done.
        shards: what this rank holds of every tensor, by name.
        rank_files: small files of this rank by name, which no other rank has.
        write_shared: writes the files that a checkpoint has once, into a folder; called by the
            first rank only.
        contents: what the manifest says besides the files; of the first rank only.
    """

    step: int
    shards: Mapping[str, TensorShard]
    rank_files: Mapping[str, bytes]
    write_shared: Callable[[Path], None]
    contents: Mapping[str, Any]


def write_checkpoint(
    snapshot: Snapshot,
    output_dir: Path,
    *,
    group: dist.ProcessGroup | None,
    total_limit: int | None = None,
) -> Path:
    """Write one checkpoint and delete the oldest ones beyond the limit.

    A failed attempt is removed; what a killed run has left is replaced by the next checkpoint of
    the same step.

    **Collective:** over `group`, a CPU group of the world; every rank must call.

    Args:
        snapshot: this rank's.
        output_dir: the folder of the run, which must be there.
        group: the ranks' CPU group.
        total_limit: complete checkpoints to keep, the newest; None keeps all.

    Returns:
        The folder.

    Raises:
        CheckpointError: on every rank, what the first failing one met.
    """
    folder = output_dir / f"{CHECKPOINT_PREFIX}{snapshot.step}{INCOMPLETE_SUFFIX}"
    rank = dist.get_rank(group)
    is_done = False
    try:
        _on_first(group, folder, lambda: _make_empty(folder))
        write_shards(snapshot.shards, folder, group)
        _on_all(group, folder, lambda: _write_small_files(snapshot, folder, is_first=rank == 0))
        names = _on_all(group, folder, lambda: sorted(path.name for path in folder.iterdir()))[0]
        mine = [name for name in names if _owner(name) == rank]
        parts = _on_all(
            group, folder, lambda: {name: describe_file(folder / name) for name in mine}
        )
        files = {name: described for part in parts for name, described in part.items()}
        _on_first(group, folder, lambda: _complete(folder, snapshot.contents, files))
        is_done = True
    finally:
        if rank == 0 and not is_done:
            shutil.rmtree(folder, ignore_errors=True)
    _on_first(group, folder, lambda: delete_beyond(output_dir, total_limit))
    return _final(folder)


def delete_beyond(output_dir: Path, total_limit: int | None) -> None:
    """Delete the oldest complete checkpoints until `total_limit` are left; None keeps all."""
    if total_limit is None:
        return
    for _step, path in find_checkpoints(output_dir)[:-total_limit]:
        remove_checkpoint(path)


def _final(folder: Path) -> Path:
    return folder.with_name(folder.name.removesuffix(INCOMPLETE_SUFFIX))


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def _write_small_files(snapshot: Snapshot, folder: Path, *, is_first: bool) -> None:
    for name, content in snapshot.rank_files.items():
        (folder / name).write_bytes(content)
        sync_to_disk(folder / name)
    if is_first:
        before = set(folder.iterdir())
        snapshot.write_shared(folder)
        for path in set(folder.iterdir()) - before:
            sync_to_disk(path)


def _owner(name: str) -> int:
    """Return the rank that has written a file, whose machine still holds it in memory."""
    match = _FILE_OF_RANK.match(name)
    return int(match[1]) if match else 0


def _complete(
    folder: Path, contents: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the manifest, give the folder its name, and point to it."""
    write_manifest(folder, contents, files)
    sync_to_disk(folder)
    final = _final(folder)
    if final.exists():
        remove_checkpoint(final)
    folder.rename(final)
    sync_to_disk(final.parent)
    pointer = final.with_name(f".{LATEST_NAME}")
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(final.name)
    pointer.replace(final.with_name(LATEST_NAME))
    sync_to_disk(final.parent)


def _on_first(group: dist.ProcessGroup | None, folder: Path, action: Callable[[], None]) -> None:
    """Do something on the first rank while the others wait, and raise everywhere what it met.

    **Collective:** as `broadcast_from_rank0`.
    """
    broadcast_from_rank0(partial(_write, folder, action), group)


def _on_all(
    group: dist.ProcessGroup | None, folder: Path, action: Callable[[], _Result]
) -> list[_Result]:
    """Do something on every rank, and return all results or raise everywhere what one rank met.

    **Collective:** as `gather_from_all_ranks`.
    """
    return gather_from_all_ranks(partial(_write, folder, action), group)


def _write(folder: Path, action: Callable[[], _Result]) -> _Result:
    try:
        return action()
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
