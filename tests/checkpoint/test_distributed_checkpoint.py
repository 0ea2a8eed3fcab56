"""Shards through torch's distributed checkpoint: written in one cut, read in any other."""

import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from megablocks_utils.checkpoint.distributed_checkpoint import (
    read_shards,
    read_stored_tensors,
    write_shards,
)
from megablocks_utils.checkpoint.tensor_shards import BlockPlace, RunPlace
from megablocks_utils.errors import CheckpointError

SHAPES = {"matrix": (7, 5), "experts": (3, 4, 5), "bias": (6,)}
WHOLES = {
    name: torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    for name, shape in SHAPES.items()
}
COPIED = torch.full((2,), 7, dtype=torch.bfloat16)


def _runs(rank, world_size, wholes):
    """Cut every tensor into one run of elements a rank, at odd places; the last rank has less."""
    shards = {}
    for name, whole in wholes.items():
        size = -(-whole.numel() // world_size)
        flat = whole.reshape(-1)
        run = flat[rank * size : (rank + 1) * size]
        if len(run):
            shards[name] = RunPlace(tuple(whole.shape), rank * size).shard(run)
    return shards


def _rows(rank, world_size, wholes):
    """Cut every tensor along its last dim; later ranks may have nothing."""
    shards = {}
    for name, whole in wholes.items():
        parts = whole.chunk(world_size, dim=-1)
        offsets = [0] * whole.dim()
        offsets[-1] = sum(part.shape[-1] for part in parts[:rank])
        local = parts[rank].contiguous() if rank < len(parts) else whole[..., :0]
        shards[name] = BlockPlace(tuple(whole.shape), tuple(offsets)).shard(local)
    return shards


CUTS = {"runs": _runs, "rows": _rows}


def _write(rank, world_size, cut, folder):
    shards = CUTS[cut](rank, world_size, WHOLES)
    shards["copied"] = BlockPlace((2,), (0,)).shard(COPIED)
    write_shards(shards, folder, None)


def _blank(cut, rank, world_size):
    blank = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return CUTS[cut](rank, world_size, blank)


@pytest.mark.parametrize("cut", CUTS)
def test_any_cut_reads_what_another_has_written(ranks2, tmp_path, cut):
    folder = tmp_path / "checkpoint"
    ranks2.run(_write, 2, cut, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
    ]
    stored = read_stored_tensors(folder)
    assert stored == {name: (shape, torch.float32) for name, shape in SHAPES.items()} | {
        "copied": ((2,), torch.bfloat16)
    }
    for other in CUTS:
        for world_size in (1, 2, 3, 4):
            for rank in range(world_size):
                wanted = CUTS[other](rank, world_size, WHOLES)
                shards = _blank(other, rank, world_size)
                read_shards(shards, folder)
                for name, shard in shards.items():
                    for block in shard.blocks:
                        assert torch.equal(block.tensor, wanted[name].tensor_at(block.offsets))
    copied = BlockPlace((2,), (0,)).shard(torch.zeros_like(COPIED))
    read_shards({"copied": copied}, folder)
    assert torch.equal(copied.tensor_at((0,)), COPIED)


def test_copies_are_written_once(ranks2, tmp_path):
    for name in ("one", "both"):
        ranks2.run(_write_copies, tmp_path / name, name == "both")
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name).glob("*.distcp"))
        for name in ("one", "both")
    ]
    assert sizes[1] < sizes[0] + 4 * 10_000  # a second copy would be 40 kB more


def _write_copies(rank, folder, on_both):
    copy = BlockPlace((10_000,), (0,)).shard(torch.ones(10_000))
    write_shards({"copied": copy} if on_both or rank == 0 else {}, folder, None)


@pytest.fixture(scope="module")
def written(ranks2, tmp_path_factory):
    """A checkpoint of two ranks."""
    folder = tmp_path_factory.mktemp("written") / "checkpoint"
    ranks2.run(_write, 2, "runs", folder)
    return folder


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("other", (2,), "it has no other (1 missing)"),
        ("bias", (8,), "its bias has shape (6,), wanted is (8,)"),
    ],
)
def test_tensor_that_does_not_fit_is_named(written, name, shape, message):
    shard = BlockPlace(shape, (0,)).shard(torch.zeros(shape))
    with pytest.raises(CheckpointError) as caught:
        read_shards({name: shard}, written)
    assert str(caught.value) == f"cannot read {written}: {message}"


@pytest.mark.parametrize("content", [None, b"", b"garbage", "truncated"])
def test_index_that_cannot_be_read_is_one_sentence(written, tmp_path, content):
    folder = shutil.copytree(written, tmp_path / "copy")
    index = folder / ".metadata"
    whole = index.read_bytes()
    index.unlink()
    if content is not None:
        index.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(CheckpointError, match=f"^cannot read {folder}/.metadata: "):
        read_stored_tensors(folder)


def _write_beyond_a_limit(rank: int, folder: Path) -> str:
    """Write 20 kB where the system allows files of 1 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        write_shards({"x": RunPlace((5000,), 0).shard(torch.zeros(5000))}, folder, None)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


def test_what_the_system_refuses_is_said_in_its_words(ranks1, tmp_path):
    """Not in those of torch's archive, which fails once more while it is closed."""
    folder = tmp_path / "c"
    assert ranks1.run(_write_beyond_a_limit, folder) == [f"cannot write {folder}: File too large"]
