"""Files written piece by piece equal save_file's, and a folder appears whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.writer import (
    SafetensorsWriter,
    TensorSpec,
    staged_folder,
)
from megablocks_utils.files import STAGING_FOLDER_NAME


def sample_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "b.matrix": torch.randn(5, 3, generator=generator),
        "a.half": torch.randn(7, generator=generator).to(torch.bfloat16),
        "c.vector": torch.randn(4, generator=generator),
        "d.scalar": torch.tensor(3, dtype=torch.int64),
        "e.empty": torch.zeros(0, 2),
    }


def specs_of(tensors):
    return [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def write(folder, tensors, max_shard_bytes=10**9):
    with SafetensorsWriter(folder, specs_of(tensors), max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.append(name, tensor)


def test_single_file_is_byte_equal_to_save_file(tmp_path):
    # Names and dtypes in the order in which save_file itself lays tensors out.
    tensors = {name: sample_tensors()[name] for name in ("b.matrix", "c.vector", "e.empty")}
    write(tmp_path, tensors)
    save_file(tensors, tmp_path / "reference.safetensors", metadata={"format": "pt"})
    written = (tmp_path / "model.safetensors").read_bytes()
    assert written == (tmp_path / "reference.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "reference.safetensors"]


def test_mixed_dtypes_are_read_back_by_safetensors(tmp_path):
    tensors = sample_tensors()
    write(tmp_path, tensors)
    loaded = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        loaded |= load_file(file)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    # 60 + 14 bytes would leave c.vector at a place that is no multiple of 4: it opens a new file.
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_shards_respect_the_size_and_are_indexed(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    write(tmp_path, tensors, max_shard_bytes=100)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path)) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 50, "total_size": 200}
    assert list(index["weight_map"].values()) == [names[0]] * 2 + [names[1]] * 2 + [names[2]]
    opened = open_checkpoint(tmp_path)
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in tensors.items())


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    write(tmp_path, {"small": torch.zeros(1), "large": torch.ones(100)}, max_shard_bytes=50)
    assert load_file(tmp_path / "model-00002-of-00002.safetensors").keys() == {"large"}


def test_views_are_cast_and_written_in_their_own_order(tmp_path):
    source = torch.randn(4, 6)
    spec = TensorSpec("t", (6, 4), torch.bfloat16)
    with SafetensorsWriter(tmp_path, [spec], max_shard_bytes=1000) as writer:
        writer.append("t", source.T)
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["t"], source.T.to(torch.bfloat16).contiguous()
    )


def test_wrong_order_and_missing_tensors_are_defects(tmp_path):
    specs = [TensorSpec("a", (2,), torch.float32), TensorSpec("b", (2,), torch.float32)]
    with (
        pytest.raises(ValueError, match=r"^b \(2,\) came where TensorSpec\(name='a'"),
        SafetensorsWriter(tmp_path, specs, max_shard_bytes=100) as writer,
    ):
        writer.append("b", torch.zeros(2))
    with (
        pytest.raises(ValueError, match=r"^1 announced tensors were never written$"),
        SafetensorsWriter(tmp_path, specs, max_shard_bytes=100) as writer,
    ):
        writer.append("a", torch.zeros(2))


def publish(output_dir, seed):
    tensors = {f"t{i}": torch.full((10,), float(seed + i)) for i in range(3)}
    with staged_folder(output_dir) as folder:
        write(folder, tensors, max_shard_bytes=50)
        (folder / "config.json").write_text(json.dumps({"seed": seed}))
        (folder / "tokenizer.json").write_text(str(seed))


def published_seed(output_dir):
    """Return the seed of a complete folder, None for one that has no config.json."""
    if not (output_dir / "config.json").exists():
        return None
    seed = json.loads((output_dir / "config.json").read_text())["seed"]
    index = open_checkpoint(output_dir)
    for i in range(3):
        assert torch.equal(index.read(f"t{i}"), torch.full((10,), float(seed + i)))
    assert (output_dir / "tokenizer.json").read_text() == str(seed)
    return seed


def test_publish_replaces_an_earlier_model_and_leaves_other_files(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"an earlier model in one file")
    (tmp_path / "config.json").write_text("{}")
    publish(tmp_path, 3)
    assert published_seed(tmp_path) == 3
    assert sorted(os.listdir(tmp_path)) == [
        "config.json",
        "metrics.jsonl",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
        "tokenizer.json",
    ]


def test_an_error_leaves_the_folder_as_it_was(tmp_path):
    publish(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError) as error, staged_folder(tmp_path) as folder:
        (folder / "config.json").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def die_at(step, output_dir, seed):
    """Publish in a forked process that ends at its n-th sync, rename or removal; say how it ended.

    Returns:
        Whether the process came to the end of the publish.
    """
    process = os.fork()
    if process == 0:
        left = [step]

        def dying(operation):
            def run(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return operation(*args, **kwargs)

            return run

        os.fsync = dying(os.fsync)
        Path.replace = dying(Path.replace)
        Path.unlink = dying(Path.unlink)
        publish(output_dir, seed)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 0


def test_death_at_any_moment_leaves_old_new_or_nothing_loadable(tmp_path, monkeypatch):
    # A process that dies loses nothing that it has written; syncing only costs time here.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    seen = []
    for step in range(100):
        output_dir = tmp_path / str(step)
        publish(output_dir, 1)
        finished = die_at(step, output_dir, 2)
        seen.append(published_seed(output_dir))
        publish(output_dir, 3)
        assert published_seed(output_dir) == 3
        assert not (output_dir / STAGING_FOLDER_NAME).exists()
        if finished:
            break
    # Old at first, then not loadable while files are moved, new at the end.
    states = [value for i, value in enumerate(seen) if i == 0 or value != seen[i - 1]]
    assert states == [1, None, 2]
    assert len(seen) > 15
