"""Write a checkpoint folder of a run under another name, and rename it when it is complete.

While it is written the folder is `checkpoint-<step>.incomplete`. The manifest is its last file, and
the rename to `checkpoint-<step>` comes when all of it is on disk. So a folder of that name is
complete, whatever happens at whatever time.
"""

import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megablocks_utils.checkpoint.distributed_checkpoint import write_shards
from megablocks_utils.checkpoint.manifest import describe_file, write_manifest
from megablocks_utils.checkpoint.tensor_shards import TensorShard
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import remove_path, replace_path, sync_to_disk, write_pointer
from megablocks_utils.processes.agreement import broadcast_from_rank0, gather_from_all_ranks
from megablocks_utils.processes.output_folder import (
    CHECKPOINT_PREFIX,
    INCOMPLETE_SUFFIX,
    LATEST_NAME,
    find_checkpoints,
    remove_checkpoint,
)

__all__ = ["Snapshot", "delete_beyond", "describe_kept", "not_written", "write_checkpoint"]

_FILE_OF_RANK = re.compile(r"(?:__|rng-)(\d+)")
_Result = TypeVar("_Result")
ChooseBest = Callable[[Collection[int]], int | None]
"""Say which of the saved steps is never removed; None: any may be."""


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
    choose_best: ChooseBest = lambda _steps: None,
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
        choose_best: which one to keep besides the newest; called by the first rank.

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
        _write_shards(snapshot, folder, group)
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
            with suppress(OSError):
                remove_path(folder)
    _on_first(group, folder, lambda: delete_beyond(output_dir, total_limit, choose_best))
    return _final(folder)


def not_written(path: Path, error: OSError | str, output_dir: Path) -> CheckpointError:
    """Return the error for what cannot be written, which says what of the run is kept."""
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else error
    return CheckpointError(f"cannot write {path}: {reason}; {describe_kept(output_dir)}")


def delete_beyond(
    output_dir: Path,
    total_limit: int | None,
    choose_best: ChooseBest = lambda _steps: None,
) -> None:
    """Delete the oldest complete checkpoints until `total_limit` are left; None keeps all.

    The best one counts and stays; beside it the newest stays also where one alone is to be kept, as
    Hugging Face's Trainer has it. Of a checkpoint that is linked to, the link goes.
    """
    if total_limit is None:
        return
    found = find_checkpoints(output_dir)
    best = choose_best([step for step, _ in found])
    others = [(step, path) for step, path in found if step != best]
    num_kept = total_limit if len(others) == len(found) else max(1, total_limit - 1)
    for _step, path in others[:-num_kept]:
        try:
            remove_checkpoint(path)
        except OSError as error:
            raise CheckpointError(
                f"cannot remove {path}, which --save_total_limit does not keep: "
                f"{error.strerror}; {describe_kept(output_dir)}"
            ) from error


def _final(folder: Path) -> Path:
    return folder.with_name(folder.name.removesuffix(INCOMPLETE_SUFFIX))


def describe_kept(output_dir: Path) -> str:
    """Say which checkpoint a run can resume from after a disk has failed."""
    try:
        complete = find_checkpoints(output_dir)
    except OSError:
        complete = []
    if not complete:
        return f"there is no complete checkpoint in {output_dir}"
    return f"{complete[-1][1]} is complete and kept"


def _make_empty(folder: Path) -> None:
    remove_path(folder)
    folder.mkdir()


def _write_shards(snapshot: Snapshot, folder: Path, group: dist.ProcessGroup | None) -> None:
    try:
        write_shards(snapshot.shards, folder, group)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {describe_kept(folder.parent)}") from error


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
    replace_path(folder, final)
    sync_to_disk(final.parent)
    write_pointer(final.with_name(LATEST_NAME), final.name)


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
        raise not_written(Path(error.filename or folder), error, folder.parent) from error
