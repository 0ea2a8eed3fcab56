"""Read the header of a safetensors file, and check all of it against the file.

A header is JSON: name -> dtype, shape and the range of bytes of the tensor's data. What it says
must be true to the byte: data without gaps or overlaps, as many bytes as the shapes ask for.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megablocks_utils.checkpoint.json_file import parse_json, refuse_lfs_pointer, show_value
from megablocks_utils.dtypes import DTYPES, PACKED_DTYPES
from megablocks_utils.errors import CheckpointError

__all__ = ["HEADER_LENGTH_BYTES", "StoredTensor", "TensorEntry", "read_header"]

HEADER_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
_MAX_BYTES = 2**63
_METADATA = "__metadata__"

_TORCH_DTYPES: dict[str, torch.dtype] = {
    dtype.safetensors_name: getattr(torch, name)
    for name, dtype in (*DTYPES.items(), *PACKED_DTYPES.items())
}
_VALUES_PER_ELEMENT = {"F4": 2}


class StoredTensor(Protocol):
    """A tensor that lies in a file, as it is or packed."""

    @property
    def path(self) -> Path:
        """The file; of several, the one that holds the values."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape when it is read."""

    @property
    def num_bytes(self) -> int:
        """Its size when it is read."""

    def read_bytes(self, start: int, num_bytes: int) -> bytes:
        """Return bytes of what `read` returns; they must be there."""

    def read(self) -> Tensor:
        """Return all of it, on the CPU."""

    def read_rows(self, start: int, stop: int, *, item: int | None = None) -> Tensor:
        """Return rows, or those of an element of dim 0; they must be there."""


@dataclass(frozen=True)
class TensorEntry:
    """Say where one tensor lies: its file, its first byte there, its dtype and its shape."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return the tensor's size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read_bytes(self, start: int, num_bytes: int) -> bytes:
        """Return some of the tensor's bytes, as they are stored."""
        stored = TensorEntry(self.path, self.offset + start, torch.uint8, (num_bytes,))
        return stored.read().numpy().tobytes()

    def read(self) -> Tensor:
        """Read the tensor into CPU memory of its own.

        Raises:
            CheckpointError: the file is not what it was.
        """
        return _read_bytes(self, self.offset, self.shape)

    def read_rows(self, start: int, stop: int, *, item: int | None = None) -> Tensor:
        """Read rows `start:stop`, or of element `item` of dim 0, and no other byte.

        Raises:
            CheckpointError: as in `read`.
        """
        num_rows, *columns = self.shape if item is None else self.shape[1:]
        row_bytes = math.prod(columns) * self.dtype.itemsize
        first_byte = self.offset + ((item or 0) * num_rows + start) * row_bytes
        return _read_bytes(self, first_byte, (stop - start, *columns))


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors that one safetensors file holds, after checking them against its size.

    Raises:
        CheckpointError: it is no safetensors file, or a damaged one.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(HEADER_LENGTH_BYTES)
            header_bytes = int.from_bytes(prefix, "little")
            text = file.read(header_bytes if header_bytes <= MAX_HEADER_BYTES else len(prefix) * 8)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    refuse_lfs_pointer(path, prefix + text)
    if len(prefix) < HEADER_LENGTH_BYTES or header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} ({file_bytes} bytes) is not a safetensors file")
    data_start = HEADER_LENGTH_BYTES + header_bytes
    _check_size(path, data_start, file_bytes, exactly=False)
    entries = _parse_header(path, text, data_start)
    _check_size(path, _find_end(path, entries, data_start), file_bytes, exactly=True)
    return entries


def _check_size(path: Path, wanted: int, found: int, *, exactly: bool) -> None:
    if found < wanted or (exactly and found > wanted):
        fault = "truncated" if found < wanted else "damaged"
        raise CheckpointError(
            f"{path} is {fault}: its header asks for {wanted} bytes, the file has {found}"
        )


def _parse_header(path: Path, text: bytes, data_start: int) -> dict[str, TensorEntry]:
    try:
        header = parse_json(text, path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} has a header that cannot be read") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that cannot be read")
    header.pop(_METADATA, None)
    return {key: _parse_entry(path, key, value, data_start) for key, value in header.items()}


def _parse_entry(path: Path, key: str, value: object, data_start: int) -> TensorEntry:
    if not key.isprintable() or not isinstance(value, dict) or not _has_types(value):
        raise CheckpointError(
            f"{path} has a header that cannot be read: {show_value(key)} is {show_value(value)}"
        )
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in _TORCH_DTYPES:
        raise CheckpointError(f"{key} in {path} has dtype {dtype}, which is not supported")
    values = _VALUES_PER_ELEMENT.get(dtype, 1)
    if values > 1 and shape and shape[-1] % values == 0:
        shape = (*shape[:-1], shape[-1] // values)
    entry = TensorEntry(path, data_start + start, _TORCH_DTYPES[dtype], shape)
    if stop - start != entry.num_bytes:
        raise CheckpointError(f"{path} has a header whose offsets contradict its shapes: {key}")
    return entry


def _has_types(value: dict[str, object]) -> bool:
    shape, offsets = value.get("shape"), value.get("data_offsets")
    return (
        isinstance(value.get("dtype"), str)
        and _are_sizes(shape)
        and _are_sizes(offsets)
        and isinstance(offsets, list)
        and len(offsets) == 2
    )


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_BYTES
        for value in values
    )


def _find_end(path: Path, entries: dict[str, TensorEntry], data_start: int) -> int:
    """Return the byte after the last tensor, having seen that they follow each other."""
    end = data_start
    # A tensor without elements has the offset of the next one.
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset != end:
            raise CheckpointError(f"{path} has a header whose offsets contradict its shapes: {key}")
        end += entry.num_bytes
    return end


def _read_bytes(entry: TensorEntry, offset: int, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape, dtype=entry.dtype)
    target = tensor.view(-1).view(torch.uint8).numpy().data
    try:
        with entry.path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(target):
                count = file.readinto(target[done:])
                if not count:
                    raise CheckpointError(
                        f"{entry.path} is truncated: {len(target)} bytes were asked for at byte"
                        f" {offset}, {done} came"
                    )
                done += count
    except OSError as error:
        raise CheckpointError(f"{entry.path} cannot be read: {error.strerror}") from error
    return tensor
