"""The index of a checkpoint is a pickle: it runs nothing, and what comes out of it is an index."""

import copy
import io
import pickle
import shutil
import subprocess
from enum import Enum

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megablocks_utils.checkpoint.dcp_index import read_index
from megablocks_utils.checkpoint.distributed_checkpoint import (
    read_shards,
    read_stored_tensors,
    read_whole_tensor,
    write_shards,
)
from megablocks_utils.checkpoint.tensor_shards import Block, TensorShard
from megablocks_utils.dtypes import DTYPES
from megablocks_utils.errors import CheckpointError


def shard_of(tensor):
    shape = tuple(tensor.shape)
    return TensorShard(shape, (Block((0,) * len(shape), tensor),))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint with a tensor of every dtype."""
    folder = tmp_path_factory.mktemp("checkpoint")
    dtypes = {name: torch.ones(2, 3).to(getattr(torch, name)) for name in DTYPES}
    write_shards({name: shard_of(tensor) for name, tensor in dtypes.items()}, folder, None)
    return folder


@pytest.fixture
def checkpoint(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoint")


class MembersByName(pickle.Pickler):
    """Pickle members of enums as Python 3.11.0 to 3.11.3 do; `name` takes the place of theirs."""

    def __init__(self, file, name=None):
        super().__init__(file)
        self._name = name

    def reducer_override(self, value):
        if isinstance(value, Enum):
            return getattr, (type(value), self._name or value.name)
        return NotImplemented


@pytest.mark.parametrize("name", [None, "mro"])
def test_members_of_enums_are_read_as_old_pythons_write_them_and_no_other_attribute(
    checkpoint, name
):
    index = read_index(checkpoint)
    with (checkpoint / ".metadata").open("wb") as file:
        MembersByName(file, name).dump(index)
    if name is None:
        assert read_index(checkpoint).state_dict_metadata == index.state_dict_metadata
    else:
        assert all("asks for builtins.getattr" in message for message in refusals(checkpoint))


def refusals(folder):
    """Return what every way of reading a checkpoint says of it."""
    ways = (
        lambda: read_stored_tensors(folder),
        lambda: read_whole_tensor("float32", (2, 3), torch.float32, folder),
        lambda: read_shards({"float32": shard_of(torch.zeros(2, 3))}, folder),
    )
    for way in ways:
        with pytest.raises(CheckpointError) as error:
            way()
        message = str(error.value)
        assert message.startswith((f"cannot read {folder / '.metadata'}: ", f"{folder}/.metadata"))
        assert "\n" not in message
        yield message


def test_what_is_written_is_read_as_torch_reads_it(written):
    ours, theirs = read_index(written), dcp.FileSystemReader(written).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert set(read_stored_tensors(written)) == set(DTYPES)


class Evil:
    """Run a command where it is unpickled."""

    def __init__(self, function, *args):
        self.parts = function, args

    def __reduce__(self):
        return self.parts


def test_no_code_runs(checkpoint, tmp_path):
    marker = tmp_path / "ran"
    good = pickle.loads((checkpoint / ".metadata").read_bytes())
    attacks = [
        Evil(subprocess.getoutput, f"touch {marker}"),
        Evil(eval, f"open({str(marker)!r}, 'w')"),
        Evil(exec, f"open({str(marker)!r}, 'w')"),
        Evil(getattr, "x", "upper"),
        Evil(torch.load, str(marker)),
        Evil(torch.hub.load, "a/b"),
    ]
    for attack in attacks:
        hidden = copy.deepcopy(good)
        hidden.planner_data = attack
        for content in (attack, hidden):
            (checkpoint / ".metadata").write_bytes(pickle.dumps(content))
            for message in refusals(checkpoint):
                assert "which no index needs" in message
    protocol_0 = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    (checkpoint / ".metadata").write_bytes(protocol_0)
    assert all("posix.system" in message for message in refusals(checkpoint))
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04N.", b"\x80\x04}.", b"\x80\x04]r."])
def test_pickles_of_something_else(checkpoint, content):
    (checkpoint / ".metadata").write_bytes(content)
    assert len(list(refusals(checkpoint))) == 3


def edit(folder, change):
    path = folder / ".metadata"
    index = pickle.loads(path.read_bytes())
    change(index)
    buffer = io.BytesIO()
    pickle.dump(index, buffer)
    path.write_bytes(buffer.getvalue())


def change_places(**values):
    def change(index):
        for place in index.storage_data.values():
            vars(place).update(values)

    return change


def change_tensor(**values):
    return lambda index: vars(index.state_dict_metadata["float32"]).update(values)


def change_chunk(**values):
    return lambda index: vars(index.state_dict_metadata["float32"].chunks[0]).update(values)


CHANGES = {
    "leads out": change_places(relative_path="../../outside"),
    "absolute": change_places(relative_path="/etc/passwd"),
    "a file that is not there": change_places(relative_path="gone"),
    "no text": change_places(relative_path=3),
    "negative": change_places(offset=-1),
    "no number": change_places(length="x"),
    "transformed": change_places(transform_descriptors=["zstd"]),
    "no places": lambda index: index.storage_data.clear(),
    "places null": lambda index: vars(index).update(storage_data=None),
    "places without parts": lambda index: index.storage_data.update({MetadataIndex("x"): 3}),
    "no entries": lambda index: vars(index).update(state_dict_metadata=[]),
    "name": lambda index: index.state_dict_metadata.update({3: BytesStorageMetadata()}),
    "size": change_tensor(size=(2, 3)),
    "larger size": change_tensor(size=torch.Size((4, 3))),
    "no parts": change_tensor(chunks=[]),
    "parts null": change_tensor(chunks=None),
    "part": change_tensor(chunks=[3]),
    "properties": change_tensor(properties=None),
    "offsets": change_chunk(offsets=torch.Size((1, 0))),
    "dims": change_chunk(sizes=torch.Size((6,))),
    "sizes": change_chunk(sizes=None),
    "part elsewhere": change_chunk(offsets=torch.Size((1, 0)), sizes=torch.Size((1, 3))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_index_that_contradicts_itself_or_the_folder(checkpoint, name):
    edit(checkpoint, CHANGES[name])
    assert len(list(refusals(checkpoint))) == 3


def test_a_linked_file_of_weights_is_refused(checkpoint, tmp_path):
    (checkpoint / "__0_0.distcp").rename(tmp_path / "outside")
    (checkpoint / "__0_0.distcp").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        read_stored_tensors(checkpoint)
