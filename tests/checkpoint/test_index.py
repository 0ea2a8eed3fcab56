"""The index reads exact bytes, and says in one sentence what is wrong with a folder."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from megablocks_utils.checkpoint.index import (
    open_checkpoint,
    open_safetensors_file,
    resolve_checkpoint_folder,
)
from megablocks_utils.errors import CheckpointError
from tests.support.tiny_models import save_tiny_model


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(6, 5),
        "half": torch.randn(3, 2, 4).to(torch.bfloat16),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
    }


def assert_message(error, message):
    assert str(error.value) == message


def test_reads_every_tensor_bit_equal(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    index = open_checkpoint(tmp_path)
    assert set(index.keys()) == set(index) == set(tensors)
    assert index.total_bytes == 6 * 5 * 4 + 3 * 2 * 4 * 2 + 8 + 0 + 3
    for key, tensor in tensors.items():
        assert (index.shape(key), index.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(index.read(key), tensor)


def test_reads_rows_into_memory_of_their_own(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    index = open_checkpoint(tmp_path)
    rows = index.read_rows("half", 1, 3)
    assert torch.equal(rows, tensors["half"][1:3])
    assert rows.untyped_storage().nbytes() == 2 * 2 * 4 * 2
    assert index.read_rows("matrix", 2, 2).shape == (0, 5)
    assert torch.equal(index.read_rows("half", 1, 2, item=2), tensors["half"][2, 1:2])


def test_sharded_folder_equals_its_files(tmp_path):
    save_tiny_model("mixtral", tmp_path, sharded=True)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    expected = {key: value for file in files for key, value in load_file(file).items()}
    index = open_checkpoint(tmp_path)
    assert len(files) > 2 and set(index) == set(expected)
    assert all(torch.equal(index.read(key), value) for key, value in expected.items())


def test_unknown_tensor_and_rows_are_named(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    index = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError) as error:
        index.read("nothing")
    assert_message(error, f"{tmp_path} has no tensor named nothing")
    with pytest.raises(CheckpointError) as error:
        index.read_rows("matrix", 4, 7)
    file = tmp_path / "model.safetensors"
    assert_message(error, f"rows 4:7 of matrix were asked for, but {file} has 6")
    for item, start, stop, num_rows in ((1, 0, 3, 2), (3, 0, 1, 0), (-1, 0, 1, 0)):
        with pytest.raises(CheckpointError) as error:
            index.read_rows("half", start, stop, item=item)
        rows = f"rows {start}:{stop} of half[{item}]"
        assert_message(error, f"{rows} were asked for, but {file} has {num_rows}")


def test_truncated_file_is_named_with_both_sizes(tmp_path, tensors):
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    wanted, found = len(data), len(data) - 1
    truncated = f"{file} is truncated: its header asks for"
    assert_message(error, f"{truncated} {wanted} bytes, the file has {found}")
    file.write_bytes(data[:40])
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    wanted = 8 + int.from_bytes(data[:8], "little")
    assert_message(error, f"{truncated} {wanted} bytes, the file has 40")


def test_file_with_bytes_too_many_is_damaged(tmp_path, tensors):
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    sizes = f"its header asks for {size} bytes, the file has {size + 1}"
    assert_message(error, f"{file} is damaged: {sizes}")


def test_file_that_shrinks_after_opening_is_named(tmp_path, tensors):
    file = tmp_path / "model.safetensors"
    save_file({"matrix": tensors["matrix"]}, file)
    index = open_checkpoint(tmp_path)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError) as error:
        index.read("matrix")
    came = f"120 bytes were asked for at byte {size - 120}, 100 came"
    assert_message(error, f"{file} is truncated: {came}")
    file.unlink()
    with pytest.raises(CheckpointError) as error:
        index.read("matrix")
    assert_message(error, f"{file} cannot be read: No such file or directory")


def test_index_naming_a_missing_file(tmp_path):
    save_tiny_model("olmoe", tmp_path)
    file = sorted(tmp_path.glob("model-*.safetensors"))[1]
    file.unlink()
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    index_file = tmp_path / "model.safetensors.index.json"
    assert_message(error, f"{index_file} names {file.name}, which is not in the folder")


def test_index_naming_a_tensor_that_its_file_lacks(tmp_path):
    save_tiny_model("olmoe", tmp_path)
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00009.safetensors"
    index_file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    where = "places ghost in model-00001-of-00009.safetensors, which does not hold it"
    assert_message(error, f"{index_file} {where}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            "{",
            "is not valid JSON: Expecting property name enclosed in double quotes: line 1 column"
            " 2 (char 1)",
        ),
        ("{}", "is not JSON with a weight_map"),
        ("[]", "holds no settings: its JSON is not an object"),
        ('{"weight_map": {}}', "has a weight_map that names no tensors"),
        ('{"weight_map": {"a": "b"}}', "has no metadata, wanted is an object"),
        ('{"weight_map": {"a": "b"}, "metadata": 1}', "has metadata 1, wanted is an object"),
    ],
)
def test_unusable_index_file(tmp_path, content, reason):
    index_file = tmp_path / "model.safetensors.index.json"
    index_file.write_text(content)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert_message(error, f"{index_file} {reason}")


def single_file_as_shard(folder):
    """Save a model in one file under the name of a shard, and return its tensors' names."""
    save_tiny_model("olmoe", folder, sharded=False)
    (folder / "model.safetensors").rename(folder / SHARD)
    return list(open_safetensors_file(folder / SHARD))


def write_index(folder, weight_map):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


SHARD = "model-00001-of-00001.safetensors"
ODD_NAMES = ["../outside", "a/../../outside", "/etc/passwd", "", ".", "..", "a/", "a\0b", "\n", 3]
ODD_NAMES += [None, [], {}, ["a"], True, "a" * 300]


@pytest.mark.parametrize("name", ODD_NAMES, ids=repr)
def test_no_name_in_an_index_leads_out_of_the_folder(tmp_path, name):
    keys = single_file_as_shard(tmp_path / "model")
    (tmp_path / "outside").write_bytes((tmp_path / "model" / SHARD).read_bytes())
    index_file = write_index(tmp_path / "model", dict.fromkeys(keys, SHARD) | {keys[0]: name})
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "model")
    message = str(error.value)
    assert message.startswith(f"{index_file} names the file ") and "\n" not in message
    assert message.endswith("wanted is a name within its folder")


def test_a_name_in_a_subfolder_is_read(tmp_path):
    keys = single_file_as_shard(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / SHARD).rename(tmp_path / "sub" / SHARD)
    write_index(tmp_path, dict.fromkeys(keys, f"sub/{SHARD}"))
    assert set(open_checkpoint(tmp_path)) == set(keys)


def test_what_a_shard_holds_and_the_index_does_not_list_is_seen(tmp_path):
    keys = single_file_as_shard(tmp_path)
    write_index(tmp_path, dict.fromkeys(keys[1:], SHARD))
    assert set(open_checkpoint(tmp_path)) == set(keys)


def test_a_tensor_that_is_stored_twice(tmp_path):
    keys = single_file_as_shard(tmp_path)
    save_file({"other": torch.zeros(2), keys[0]: torch.zeros(2)}, tmp_path / "more.safetensors")
    write_index(tmp_path, dict.fromkeys(keys, SHARD) | {"other": "more.safetensors"})
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    files = f"{tmp_path / SHARD} and {tmp_path / 'more.safetensors'}"
    assert_message(error, f"{keys[0]} is stored twice, in {files}")


def test_weights_of_two_models_in_one_folder(tmp_path):
    save_tiny_model("olmoe", tmp_path)
    save_tiny_model("olmoe", tmp_path / "other", sharded=False)
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    both = "holds model.safetensors and also model.safetensors.index.json, which names other files"
    assert_message(error, f"{tmp_path} {both}: remove the weights that are not the model's")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_cache_of_the_hub_that_cannot_be_written_is_named(monkeypatch, tmp_path, number):
    def download(name, **options):
        raise OSError(number, os.strerror(number), "x")

    monkeypatch.setattr("megablocks_utils.checkpoint.index.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError) as error:
        resolve_checkpoint_folder("someone/model")
    assert_message(
        error,
        f"'someone/model' cannot be fetched from the Hub: its cache {tmp_path / 'cache'} cannot be"
        f" written ({os.strerror(number)}); set HF_HOME to a folder that can",
    )


def test_folders_without_usable_weights(tmp_path):
    names = "model.safetensors or model.safetensors.index.json"
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert_message(error, f"{tmp_path} has no safetensors weights ({names}): no weights at all")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    only = "only pytorch_model.bin, which is not read here"
    assert_message(error, f"{tmp_path} has no safetensors weights ({names}): {only}")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "gone")
    assert_message(error, f"the model folder {tmp_path / 'gone'} does not exist")


def test_shards_without_their_index_file(tmp_path):
    save_tiny_model("mixtral", tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    first = "model-00001-of-00009.safetensors"
    missing = "no model.safetensors.index.json that lists its tensors"
    assert_message(error, f"{tmp_path} holds {first} but {missing}")


def test_resolve_takes_a_local_folder_as_it_is(tmp_path):
    assert resolve_checkpoint_folder(str(tmp_path)) == tmp_path


def test_resolve_names_what_is_not_a_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError) as error:
        resolve_checkpoint_folder(str(file))
    assert_message(error, f"{file} is a file, but a model folder is wanted")
    for path in (str(tmp_path / "gone"), "./gone", "models/a/gone"):
        with pytest.raises(CheckpointError) as error:
            resolve_checkpoint_folder(path)
        assert_message(error, f"the model folder {path} does not exist")


@pytest.mark.parametrize(
    ("name", "cause"), [("nobody/none", "LocalEntryNotFoundError"), ("a b", "HFValidationError")]
)
def test_resolve_without_the_hub(monkeypatch, tmp_path, name, cause):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as error:
        resolve_checkpoint_folder(name)
    tried = "and fetching a model of that name from the Hub failed"
    assert_message(error, f"{name!r} is not a local folder, {tried} ({cause})")


def test_resolve_asks_the_hub_for_what_is_read(monkeypatch, tmp_path):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megablocks_utils.checkpoint.index.snapshot_download", download)
    assert resolve_checkpoint_folder("someone/model") == tmp_path
    patterns = ["*.safetensors", "*.json", "*.model", "*.jinja", "tokenizer*", "*.txt"]
    assert asked == {
        "name": "someone/model",
        "allow_patterns": patterns,
        "ignore_patterns": "consolidated*",
    }
