"""Read the index of a distributed checkpoint (`.metadata`) without running code of who wrote it.

torch writes the index as a pickle, which can name any function of Python. Here only the classes
that torch's own index is made of are looked up, everything that comes out is checked, and the files
it names must be those of the folder. Every reading of a checkpoint goes through this.
"""

import math
import pickle
from enum import EnumType
from functools import lru_cache
from pathlib import Path
from typing import TypeGuard

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megablocks_utils.checkpoint.folder_files import find_file
from megablocks_utils.dtypes import DTYPES
from megablocks_utils.errors import CheckpointError

__all__ = ["DCP_INDEX_NAME", "IndexReader", "read_index", "stored_tensors"]

DCP_INDEX_NAME = ".metadata"

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *((_METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name in DTYPES),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")),
    ("collections", "OrderedDict"),
}
# What a damaged pickle, or one of other objects than the writer's, can end in.
_UNREADABLE = (
    *(pickle.UnpicklingError, EOFError, ImportError, AttributeError, TypeError, ValueError),
    *(LookupError, OverflowError, MemoryError, RuntimeError),
)


class IndexReader(dcp.FileSystemReader):
    """Read a checkpoint with torch's reader, but its index with `read_index`."""

    def read_metadata(self, *_args: object, **_kwargs: object) -> Metadata:
        """Return the checked index."""
        index = read_index(Path(self.path))
        index.storage_meta = StorageMeta(load_id=self.load_id)
        return index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("builtins", "getattr"):
            return _read_member
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index needs")
        return super().find_class(module, name)


def _read_member(owner: object, name: str) -> object:
    """Return a member of an enum: as such a getattr, Python 3.11.0 to 3.11.3 pickle them."""
    if not isinstance(owner, EnumType) or name not in owner.__members__:
        raise pickle.UnpicklingError("it asks for builtins.getattr, which no index needs")
    return owner[name]


def read_index(folder: Path) -> Metadata:
    """Return the index of a checkpoint.

    Raises:
        CheckpointError: there is none, it asks for anything but an index's classes, it is damaged,
            or it names parts or files that are not there.
    """
    path = folder / DCP_INDEX_NAME
    try:
        written = path.stat()
        return _read_index(folder, (written.st_mtime_ns, written.st_size))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


@lru_cache(maxsize=1)
def _read_index(folder: Path, _written: tuple[int, int]) -> Metadata:
    """Read the index once for all tensors that are read one after the other."""
    path = folder / DCP_INDEX_NAME
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
        fault = _find_fault(index)
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"cannot read {path}: {reason}") from error
    if fault is not None:
        raise CheckpointError(f"cannot read {path}: {fault}")
    for name in {stored.relative_path for stored in index.storage_data.values()}:
        find_file(folder, name, path)
    return index


def stored_tensors(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """Return the entries of tensors; this project writes no others."""
    return {
        name: stored
        for name, stored in index.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


def _find_fault(index: object) -> str | None:
    """Say in a clause what is wrong with an index, or return None."""
    entries = getattr(index, "state_dict_metadata", None)
    places = getattr(index, "storage_data", None)
    if not isinstance(index, Metadata) or not isinstance(entries, dict):
        return "it is no index of tensors"
    if not isinstance(places, dict) or not all(map(_is_place, places, places.values())):
        return "it does not say where in which file its tensors are"
    held = {(place.fqn, tuple(place.offset)) for place in places}
    for name, stored in entries.items():
        if not isinstance(name, str):
            return "it is no index of tensors"
        if isinstance(stored, TensorStorageMetadata):
            fault = _find_fault_of_tensor(name, stored, held)
            if fault is not None:
                return fault
    return None


def _is_place(key: object, place: object) -> bool:
    return (
        isinstance(key, MetadataIndex)
        and isinstance(getattr(key, "fqn", None), str)
        and isinstance(getattr(key, "offset", None), torch.Size | None)
        and isinstance(getattr(place, "relative_path", None), str)
        and all(_is_size(getattr(place, name, None)) for name in ("offset", "length"))
        and getattr(place, "transform_descriptors", None) is None
    )


def _find_fault_of_tensor(
    name: str, stored: TensorStorageMetadata, held: set[tuple[str, tuple[int, ...]]]
) -> str | None:
    parts = vars(stored)
    size, chunks, properties = (parts.get(key) for key in ("size", "chunks", "properties"))
    has_dtype = isinstance(properties, TensorProperties) and isinstance(
        vars(properties).get("dtype"), torch.dtype
    )
    if not _is_shape(size) or not has_dtype or not isinstance(chunks, list):
        return f"its {name} has no shape, dtype or parts"
    if not all(_is_chunk(chunk, size) for chunk in chunks):
        return f"its {name} has parts that are not in its shape"
    if any((name, tuple(chunk.offsets)) not in held for chunk in chunks):
        return f"it does not say where parts of {name} are"
    if sum(math.prod(chunk.sizes) for chunk in chunks) < math.prod(size):
        return f"it lacks parts of {name}"
    return None


def _is_chunk(chunk: object, size: torch.Size) -> bool:
    if not isinstance(chunk, ChunkStorageMetadata):
        return False
    offsets, sizes = (vars(chunk).get(name) for name in ("offsets", "sizes"))
    if not _is_shape(offsets) or not _is_shape(sizes):
        return False
    if not len(offsets) == len(sizes) == len(size):
        return False
    return all(o + n <= whole for o, n, whole in zip(offsets, sizes, size, strict=True))


def _is_shape(shape: object) -> TypeGuard[torch.Size]:
    return isinstance(shape, torch.Size) and all(map(_is_size, shape))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
