"""Writing a checkpoint: complete under its name or not there, with one reason everywhere."""

import os
import resource
from pathlib import Path
from unittest import mock

import pytest
import torch

from megablocks_utils.checkpoint.distributed_checkpoint import read_shards
from megablocks_utils.checkpoint.manifest import check_files, read_manifest
from megablocks_utils.checkpoint.snapshot import Snapshot, delete_beyond, write_checkpoint
from megablocks_utils.checkpoint.tensor_shards import BlockPlace
from megablocks_utils.errors import CheckpointError
from megablocks_utils.processes.output_folder import find_checkpoints, find_incomplete

ROWS = 1000  # a rank's part of the tensor is 8 kB
FILES = [
    ".metadata",
    "__0_0.distcp",
    "__1_0.distcp",
    "manifest.json",
    "metrics.jsonl",
    "rng-00000.json",
    "rng-00001.json",
]


def _snapshot(rank, step, value):
    """Return half of a tensor of `value`, a file of this rank and one of both."""
    return Snapshot(
        step=step,
        shards={
            "x": BlockPlace((2 * ROWS, 2), (rank * ROWS, 0)).shard(torch.full((ROWS, 2), value))
        },
        rank_files={f"rng-{rank:05d}.json": b"%d" % rank},
        write_shared=lambda folder: (folder / "metrics.jsonl").write_text("metrics") and None,
        contents={"step": step, "value": value} if rank == 0 else {},
    )


def _save(rank, folder, steps, value=1.0, total_limit=None):
    """Write checkpoints; returns the folder of the last, or what was raised."""
    try:
        for step in steps:
            snapshot = _snapshot(rank, step, value)
            path = write_checkpoint(snapshot, folder, group=None, total_limit=total_limit)
    except CheckpointError as error:
        return str(error)
    return str(path)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _stored_value(folder: Path) -> float:
    """Check the files of a checkpoint, and return the value that all of its tensor has."""
    manifest = read_manifest(folder)
    assert _names(folder) == FILES
    assert sorted(manifest["files"]) == [name for name in FILES if name != "manifest.json"]
    check_files(folder, manifest["files"], manifest["files"])
    whole = torch.zeros(2 * ROWS, 2)
    read_shards({"x": BlockPlace((2 * ROWS, 2), (0, 0)).shard(whole)}, folder)
    assert whole.unique().tolist() == [manifest["value"]]
    return manifest["value"]


def test_newest_checkpoints_are_kept_and_pointed_to(ranks2, tmp_path):
    answers = ranks2.run(_save, tmp_path, [2, 4, 10], total_limit=2)
    assert answers == [str(tmp_path / "checkpoint-10")] * 2
    assert _names(tmp_path) == ["checkpoint-10", "checkpoint-4", "checkpoint-latest"]
    assert (tmp_path / "checkpoint-latest").readlink() == Path("checkpoint-10")
    assert [step for step, _ in find_checkpoints(tmp_path)] == [4, 10]
    assert _stored_value(tmp_path / "checkpoint-latest") == 1.0


def test_same_step_is_replaced_and_what_was_left_half_written_is_gone(ranks2, tmp_path):
    ranks2.run(_save, tmp_path, [2, 4])
    (tmp_path / "checkpoint-2" / "of another run").touch()
    half = tmp_path / "checkpoint-2.incomplete"
    half.mkdir()
    (half / "rng-00007.json").write_text("of a larger run that died")
    ranks2.run(_save, tmp_path, [2], value=5.0)
    assert _stored_value(tmp_path / "checkpoint-2") == 5.0
    assert _stored_value(tmp_path / "checkpoint-4") == 1.0
    assert not half.exists()


def test_delete_beyond_keeps_the_newest_and_what_is_not_a_checkpoint(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "manifest.json").touch()
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-7.incomplete").mkdir()
    (tmp_path / "notes").touch()
    delete_beyond(tmp_path, None)
    assert len(_names(tmp_path)) == 6
    delete_beyond(tmp_path, 1)
    assert _names(tmp_path) == [
        "checkpoint-100",
        "checkpoint-7.incomplete",
        "checkpoint-8",
        "notes",
    ]


def test_a_linked_checkpoint_is_never_written_or_deleted_through_its_link(ranks2, tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    folder.mkdir()
    ranks2.run(_save, elsewhere, [2, 4, 6])
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-latest"):
        (folder / name).symlink_to(elsewhere / name)
    (folder / "checkpoint-4.incomplete").symlink_to(elsewhere / "checkpoint-6")
    ranks2.run(_save, folder, [4, 8], value=5.0, total_limit=2)
    assert _names(folder) == ["checkpoint-4", "checkpoint-8", "checkpoint-latest"]
    assert _stored_value(folder / "checkpoint-4") == 5.0
    for step in (2, 4, 6):
        assert _stored_value(elsewhere / f"checkpoint-{step}") == 1.0


def _save_without_renaming(rank, failing_rank, name, *args, **kwargs):
    rename = os.rename

    def fail(source, target, **options):
        if Path(source).name == name:
            raise OSError(5, "Input/output error")
        rename(source, target, **options)

    with mock.patch("os.rename", fail), mock.patch("os.replace", fail):
        return _save(rank, *args, **kwargs)


def test_a_checkpoint_that_is_saved_again_outlives_a_disk_that_fails(ranks2, tmp_path):
    ranks2.run(_save, tmp_path, [4])
    answers = ranks2.run(
        _save_without_renaming, 0, "checkpoint-4.incomplete", tmp_path, [4], value=2.0
    )
    kept = f"{tmp_path}/checkpoint-4 is complete and kept"
    where = f"{tmp_path}/checkpoint-4.incomplete"
    assert answers == [f"cannot write {where}: Input/output error; {kept}"] * 2
    assert _stored_value(tmp_path / "checkpoint-4") == 1.0
    assert _names(tmp_path) == ["checkpoint-4", "checkpoint-latest"]


def _save_with_small_files(rank, failing_rank, limit, *args, **kwargs):
    """Save while one rank can write no file larger than `limit` bytes: the kernel refuses it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        return _save(rank, *args, **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _save_without_syncing(rank, failing_rank, name, *args, **kwargs):
    """Save while one rank's disk fails as a file called `name` is waited for."""
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        is_it = Path(f"/proc/self/fd/{descriptor}").readlink().name == name
        if is_it and rank == failing_rank:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with mock.patch("os.fsync", fail):
        return _save(rank, *args, **kwargs)


FAILURES = [
    (_save_with_small_files, 1, 5000, "File too large"),  # its tensors
    (_save_with_small_files, 0, 5000, "File too large"),
    (_save_with_small_files, 1, 0, "File too large"),
    (_save_without_syncing, 1, "__1_0.distcp", "No space left on device"),
    (_save_without_syncing, 0, ".metadata.tmp", "No space left on device"),
    (_save_without_syncing, 1, "rng-00001.json", "No space left on device"),
    (_save_without_syncing, 0, "metrics.jsonl", "No space left on device"),
    (_save_without_syncing, 0, "manifest.json", "No space left on device"),
    (_save_without_syncing, 0, "checkpoint-4.incomplete", "No space left on device"),
]


@pytest.mark.parametrize(("save", "rank", "what", "reason"), FAILURES)
def test_save_that_fails_leaves_the_last_one_and_says_why(
    ranks2, tmp_path, save, rank, what, reason
):
    ranks2.run(_save, tmp_path, [2])
    answers = ranks2.run(save, rank, what, tmp_path, [4], total_limit=1)
    kept = f"{tmp_path}/checkpoint-2 is complete and kept"
    assert answers == [f"cannot write {tmp_path}/checkpoint-4.incomplete: {reason}; {kept}"] * 2
    assert _names(tmp_path) == ["checkpoint-2", "checkpoint-latest"]
    assert _stored_value(tmp_path / "checkpoint-latest") == 1.0
    assert find_incomplete(tmp_path) == []
    ranks2.run(_save, tmp_path, [4])  # the ranks still agree on what comes next
    assert _stored_value(tmp_path / "checkpoint-latest") == 1.0


def test_folder_that_is_gone_is_named(ranks2, tmp_path):
    answers = ranks2.run(_save, tmp_path / "gone", [4])
    reason = "No such file or directory"
    kept = f"there is no complete checkpoint in {tmp_path}/gone"
    sentence = f"cannot write {tmp_path}/gone/checkpoint-4.incomplete: {reason}; {kept}"
    assert answers == [sentence] * 2
