"""A header that is not true to the byte is one sentence that names the file, never a traceback."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.errors import CheckpointError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
FIRST, SECOND = "a.weight", "b.weight"


@pytest.fixture
def saved(tmp_path):
    """A file of two tensors; its header and the bytes after it."""
    file = tmp_path / "model.safetensors"
    save_file({FIRST: torch.zeros(2, 3), SECOND: torch.ones(4)}, file)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return file, json.loads(content[8 : 8 + length]), content[8 + length :]


def refusal(file, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    number = len(text) if length is None else length
    file.write_bytes(number.to_bytes(8, "little") + text + data)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(file.parent)
    message = str(error.value)
    assert str(file) in message and "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize("content", [b"", b"1234567", b"\0" * 8, b"PK\3\4" + bytes(99), b"x" * 99])
def test_other_files_under_the_name(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match="is not a safetensors file|header that cannot be|is truncated"
    ):
        open_checkpoint(tmp_path)


def test_a_pointer_of_lfs_is_named_as_such(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(LFS)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert str(error.value) == (
        f"{file} is a pointer of Git LFS, not the file itself: run git lfs pull there, or download"
        " the repository with hf download"
    )


@pytest.mark.parametrize("length", [0, 1, 10_000, 100_000_000, 2**63, 2**64 - 1])
def test_lengths(saved, length):
    refusal(*saved, length)


OFFSETS = [[-4, 20], [24, 0], [0, 2**64], [0.0, 24.0], ["0", "24"], [0], [0, 1, 24], None]
OFFSETS += [[False, 24], [4, 28], [0, 16], "024", {"0": 24}, [24, 48], float("nan")]
SHAPES = [[-2, -3], [2.0, 3.0], ["6"], "23", None, [2**62, 2**62], [True, 2, 3], [[2, 3]], 6]
SHAPES += [{"2": 3}, [0], [], [2**70, 0]]
DTYPES = ["F8_E4M3FNUZ", "F6_E2M3", None, ["F32"], 7, "F16", "I64", "", "f32", {}]
CHANGES = [("data_offsets", value) for value in OFFSETS] + [("shape", value) for value in SHAPES]
CHANGES += [("dtype", value) for value in DTYPES]


@pytest.mark.parametrize(("name", "value"), CHANGES, ids=repr)
def test_values_of_an_entry(saved, name, value):
    file, header, data = saved
    refusal(file, header | {FIRST: header[FIRST] | {name: value}}, data)


@pytest.mark.parametrize("entry", [None, [], "x", 1, {}, {"dtype": "F32", "shape": [1]}], ids=repr)
def test_entries(saved, entry):
    file, header, data = saved
    refusal(file, header | {SECOND: entry}, data)


def test_two_tensors_over_the_same_bytes(saved):
    file, header, data = saved
    assert "offsets contradict its shapes" in refusal(file, header | {"c": header[SECOND]}, data)
    assert "is damaged" in refusal(file, {FIRST: header[FIRST]}, data)


@pytest.mark.parametrize(
    "text",
    [
        *(b"{not json", b"[]", b'"x"', b"null", b"1", b"\xff\xfe{}", b"{}x"),
        *(b"[" * 200_000, b'{"a":' * 100_000, b"9" * 5000, b'{"a":NaN}', b'{"\\udcff":1}'),
    ],
    ids=lambda text: repr(text[:9]),
)
def test_texts_that_are_no_header(saved, text):
    assert "has a header that cannot be read" in refusal(saved[0], text, saved[2])


def test_a_name_that_is_there_twice(saved):
    file, header, data = saved
    twice = json.dumps(header)[:-1] + "," + json.dumps({FIRST: header[FIRST]})[1:]
    assert "has a header that cannot be read" in refusal(file, twice.encode(), data)


def test_tensors_without_elements_and_scalars_are_read(tmp_path):
    tensors = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0), "row": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    index = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(index.read(name), tensor), name
