"""Find a model folder and read single tensors, or rows of them, out of its safetensors files.

Opening a checkpoint reads and checks every file's header and no weights. A tensor is then read
with plain file reads into memory of its own: nothing is memory-mapped, so nothing keeps a file
alive, resident memory grows by what was asked for only, and a file that shrinks after it was
opened gives a sentence instead of a bus error.
"""

import errno
import os
from collections.abc import Iterator, KeysView, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Tensor

from megablocks_utils.checkpoint.dequantized_index import dequantize_entries, refuse_unscaled
from megablocks_utils.checkpoint.folder_files import (
    check_files_of_folder,
    find_file,
    refuse_link_out,
)
from megablocks_utils.checkpoint.garbage_pause import pause_garbage_search
from megablocks_utils.checkpoint.json_file import JsonObject, read_settings
from megablocks_utils.checkpoint.packed_weights import PackedWeight
from megablocks_utils.checkpoint.safetensors_header import StoredTensor, TensorEntry, read_header
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import MODEL_INDEX_NAME, MODEL_WEIGHTS_NAME

__all__ = [
    "CheckpointIndex",
    "open_checkpoint",
    "open_safetensors_file",
    "open_stored_checkpoint",
    "resolve_checkpoint_folder",
]

MAX_NAME_BYTES = 255
"""Of a file or folder, on nearly every file system."""
HUB_FILE_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.jinja", "tokenizer*", "*.txt")
# Some repositories hold their weights a second time, in their author's own naming.
HUB_DUPLICATE_PATTERN = "consolidated*"
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


class CheckpointIndex:
    """Give access to the tensors of one checkpoint folder by their Hub names.

    Holds names, shapes and positions only; a file is open just while a tensor is read from it.

    Attributes:
        folder: the folder.
        notes: what a user should know of how its tensors are read, one line each.
    """

    def __init__(
        self, folder: Path, entries: Mapping[str, StoredTensor], notes: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self.notes = tuple(notes)
        self._entries = entries

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def keys(self) -> KeysView[str]:
        """Return every tensor's name."""
        return self._entries.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of tensor `key`."""
        return self._entry(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype in which tensor `key` is stored, or is read where that is packed."""
        return self._entry(key).dtype

    def path(self, key: str) -> Path:
        """Return the file that holds tensor `key`."""
        return self._entry(key).path

    @property
    def total_bytes(self) -> int:
        """Return the size of all tensors together."""
        return sum(entry.num_bytes for entry in self._entries.values())

    def num_bytes(self, key: str) -> int:
        """Return the size of tensor `key` in bytes."""
        return self._entry(key).num_bytes

    def read_bytes(self, key: str, start: int, num_bytes: int) -> bytes:
        """Read bytes of tensor `key`, or as many as follow `start`.

        Raises:
            CheckpointError: as in `read`.
        """
        entry = self._entry(key)
        return entry.read_bytes(start, min(num_bytes, entry.num_bytes - start))

    def read(self, key: str) -> Tensor:
        """Read tensor `key` into CPU memory of its own.

        Raises:
            CheckpointError: the tensor is not there, or its file is not what it was.
        """
        return self._entry(key).read()

    def read_rows(self, key: str, start: int, stop: int, *, item: int | None = None) -> Tensor:
        """Read rows `start:stop` of tensor `key`, or of its element `item`, and no other byte.

        Raises:
            CheckpointError: the tensor or some of the rows are not there, or as in `read`.
        """
        entry = self._entry(key)
        shape = entry.shape if item is None else entry.shape[1:]
        num_rows = shape[0] if shape and (item or 0) in range(entry.shape[0]) else 0
        if not 0 <= start <= stop <= num_rows:
            part = key if item is None else f"{key}[{item}]"
            raise CheckpointError(
                f"rows {start}:{stop} of {part} were asked for, but {entry.path} has {num_rows}"
            )
        return entry.read_rows(start, stop, item=item)

    def find_packed(self, key: str) -> PackedWeight | None:
        """Return tensor `key` as it is stored, where it is packed in few bits; else None."""
        entry = self._entry(key)
        return entry if isinstance(entry, PackedWeight) else None

    def _entry(self, key: str) -> StoredTensor:
        if key not in self._entries:
            raise CheckpointError(f"{self.folder} has no tensor named {key}")
        return self._entries[key]


def resolve_checkpoint_folder(
    name_or_path: str, *, kind: str = "model", patterns: Sequence[str] = HUB_FILE_PATTERNS
) -> Path:
    """Return the local folder of a model, fetching it from the Hub when it is not a local one.

    Args:
        name_or_path: local folder or Hub name.
        kind: what messages call it.
        patterns: the files to fetch; safetensors, configuration and tokenizer unless given.

    Raises:
        CheckpointError: no such folder, and no such model on the Hub or no way to reach it.
    """
    article = "an" if kind[0] in "aeiou" else "a"
    # `Path.expanduser` raises for the home of a user that there is not.
    folder = Path(os.path.expanduser(name_or_path))
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in folder.parts):
        raise CheckpointError(f"no {kind} has a name as long as {name_or_path[:40]}...")
    if folder.is_dir():
        check_files_of_folder(folder, patterns)
        return folder
    if folder.exists():
        raise CheckpointError(f"{name_or_path} is a file, but {article} {kind} folder is wanted")
    if folder.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise CheckpointError(f"the {kind} folder {name_or_path} does not exist")
    try:
        return Path(
            snapshot_download(
                name_or_path,
                allow_patterns=list(patterns),
                ignore_patterns=HUB_DUPLICATE_PATTERN,
            )
        )
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            raise CheckpointError(
                f"{name_or_path!r} cannot be fetched from the Hub: its cache"
                f" {constants.HF_HUB_CACHE} cannot be written ({error.strerror}); set HF_HOME to a"
                " folder that can"
            ) from error
        raise CheckpointError(
            f"{name_or_path!r} is not a local folder, and fetching {article} {kind} of that name"
            f" from the Hub failed ({type(error).__name__})"
        ) from error


def open_checkpoint(folder: str | Path, *, dtype: torch.dtype | None = None) -> CheckpointIndex:
    """Read the headers of all safetensors files of a model folder, single-file or sharded.

    A weight that its publisher has quantized is given as one floating-point tensor under its plain
    name, and dequantized as its rows are read.

    Args:
        folder: the model folder.
        dtype: of quantized weights when they are read, None: bfloat16; others have that in which
            they are stored.

    Raises:
        CheckpointError: no safetensors weights, a missing or damaged file, an index that names
            files or tensors that are not there, weights of two models, or quantized weights that
            cannot be read.
    """
    folder = Path(folder)
    with pause_garbage_search():
        entries = dequantize_entries(folder, _read_folder(folder), dtype or torch.bfloat16)
    return CheckpointIndex(folder, *entries)


def open_stored_checkpoint(folder: str | Path) -> CheckpointIndex:
    """Read the headers likewise, but give every tensor as it is stored, packed or not.

    Raises:
        CheckpointError: as `open_checkpoint`, but for what is quantized.
    """
    folder = Path(folder)
    return CheckpointIndex(folder, _read_folder(folder))


def _read_folder(folder: Path) -> dict[str, TensorEntry]:
    if not folder.is_dir():
        raise CheckpointError(f"the model folder {folder} does not exist")
    single, index = folder / MODEL_WEIGHTS_NAME, folder / MODEL_INDEX_NAME
    if index.is_file():
        entries = _read_sharded(index)
        if single.is_file() and any(entry.path != single for entry in entries.values()):
            raise CheckpointError(
                f"{folder} holds {single.name} and also {index.name}, which names other files:"
                " remove the weights that are not the model's"
            )
        return entries
    if single.is_file():
        refuse_link_out(folder, single)
        return read_header(single)
    raise CheckpointError(_describe_missing_weights(folder))


def open_safetensors_file(path: Path) -> CheckpointIndex:
    """Read the header of one safetensors file of an adapter, which must exist.

    Raises:
        CheckpointError: the file is damaged, or holds quantized tensors.
    """
    refuse_link_out(path.parent, path)
    entries = read_header(path)
    refuse_unscaled(entries, "which is not read here")
    return CheckpointIndex(path.parent, entries)


def _describe_missing_weights(folder: Path) -> str:
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        return f"{folder} holds {shards[0]} but no {MODEL_INDEX_NAME} that lists its tensors"
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    found = f"only {pickled[0]}, which is not read here" if pickled else "no weights at all"
    return (
        f"{folder} has no safetensors weights ({MODEL_WEIGHTS_NAME} or {MODEL_INDEX_NAME}): {found}"
    )


def _read_sharded(index_path: Path) -> dict[str, TensorEntry]:
    folder = index_path.parent
    weight_map = _read_weight_map(index_path)
    headers = {}
    for key, file_name in weight_map.items():
        if not isinstance(file_name, str) or file_name not in headers:
            headers[file_name] = read_header(find_file(folder, file_name, index_path))
        if key not in headers[file_name]:
            raise CheckpointError(
                f"{index_path} places {key} in {file_name}, which does not hold it"
            )
    # Also what a file holds and the index does not list, as transformers reads it.
    entries: dict[str, TensorEntry] = {}
    for header in headers.values():
        for key in entries.keys() & header.keys():
            raise CheckpointError(
                f"{key} is stored twice, in {entries[key].path} and {header[key].path}"
            )
        entries |= header
    return entries


def _read_weight_map(index_path: Path) -> dict[str, Any]:
    settings = read_settings(index_path, "model")
    weight_map = settings.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index_path} is not JSON with a weight_map")
    if not weight_map:
        raise CheckpointError(f"{index_path} has a weight_map that names no tensors")
    JsonObject(index_path, settings).section("metadata")  # which transformers reads too
    return weight_map
