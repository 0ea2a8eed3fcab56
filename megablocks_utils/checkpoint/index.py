"""Find a model folder and read single tensors, or rows of them, out of its safetensors files.

Opening a checkpoint reads and checks every file's header and no weights. A tensor is then read
with plain file reads into memory of its own: nothing is memory-mapped, so nothing keeps a file
alive, resident memory grows by what was asked for only, and a file that shrinks after it was
opened gives a sentence instead of a bus error.
"""

import json
import math
from collections.abc import Iterator, KeysView, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Tensor

from megablocks_utils.dtypes import DTYPES
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import MODEL_INDEX_NAME, MODEL_WEIGHTS_NAME

__all__ = [
    "HEADER_LENGTH_BYTES",
    "CheckpointIndex",
    "open_checkpoint",
    "open_safetensors_file",
    "resolve_checkpoint_folder",
]

HUB_FILE_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.jinja", "tokenizer*", "*.txt")
# Some repositories hold their weights a second time, in their author's own naming.
HUB_DUPLICATE_PATTERN = "consolidated*"
HEADER_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000

_TORCH_DTYPES: dict[str, torch.dtype] = {
    dtype.safetensors_name: getattr(torch, name) for name, dtype in DTYPES.items()
}


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


class CheckpointIndex:
    """Give access to the tensors of one checkpoint folder by their Hub names.

    Holds names, shapes and positions only; a file is open just while a tensor is read from it.
    """

    def __init__(self, folder: Path, entries: dict[str, TensorEntry]):
        self.folder = folder
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
        """Return the dtype in which tensor `key` is stored."""
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
        """Read stored bytes of tensor `key`, or as many as follow `start`.

        Raises:
            CheckpointError: as in `read`.
        """
        entry = self._entry(key)
        num_bytes = min(num_bytes, entry.num_bytes - start)
        stored = TensorEntry(entry.path, entry.offset + start, torch.uint8, (num_bytes,))
        return _read_bytes(stored, stored.offset, stored.shape).numpy().tobytes()

    def read(self, key: str) -> Tensor:
        """Read tensor `key` into CPU memory of its own.

        Raises:
            CheckpointError: the tensor is not there, or its file is not what it was.
        """
        entry = self._entry(key)
        return _read_bytes(entry, entry.offset, entry.shape)

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
        row_bytes = math.prod(shape[1:]) * entry.dtype.itemsize
        first_byte = entry.offset + ((item or 0) * num_rows + start) * row_bytes
        return _read_bytes(entry, first_byte, (stop - start, *shape[1:]))

    def _entry(self, key: str) -> TensorEntry:
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
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
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
        raise CheckpointError(
            f"{name_or_path!r} is not a local folder, and fetching {article} {kind} of that name"
            f" from the Hub failed ({type(error).__name__})"
        ) from error


def open_checkpoint(folder: str | Path) -> CheckpointIndex:
    """Read the headers of all safetensors files of a model folder, single-file or sharded.

    Raises:
        CheckpointError: no safetensors weights, a missing or damaged file, or an index that names
            files or tensors that are not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"the model folder {folder} does not exist")
    if (folder / MODEL_WEIGHTS_NAME).is_file():
        return CheckpointIndex(folder, _read_header(folder / MODEL_WEIGHTS_NAME))
    if (folder / MODEL_INDEX_NAME).is_file():
        return CheckpointIndex(folder, _read_sharded(folder / MODEL_INDEX_NAME))
    raise CheckpointError(_describe_missing_weights(folder))


def open_safetensors_file(path: Path) -> CheckpointIndex:
    """Read the header of one safetensors file, which must exist.

    Raises:
        CheckpointError: the file is damaged.
    """
    return CheckpointIndex(path.parent, _read_header(path))


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
    weight_map = _read_weight_map(index_path)
    headers = {}
    for file_name in sorted(set(weight_map.values())):
        if not (index_path.parent / file_name).is_file():
            raise CheckpointError(f"{index_path} names {file_name}, which is not in the folder")
        headers[file_name] = _read_header(index_path.parent / file_name)
    lacking = [key for key, file_name in weight_map.items() if key not in headers[file_name]]
    if lacking:
        raise CheckpointError(
            f"{index_path} places {lacking[0]} in {weight_map[lacking[0]]}, which does not hold it"
            f" ({len(lacking)} such tensors)"
        )
    return {key: headers[file_name][key] for key, file_name in weight_map.items()}


def _read_weight_map(index_path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index_path} is not JSON with a weight_map") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has a weight_map that names no tensors")
    return weight_map


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors that one safetensors file holds, after checking them against its size."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(HEADER_LENGTH_BYTES)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < HEADER_LENGTH_BYTES or header_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} ({file_bytes} bytes) is not a safetensors file")
        _check_size(path, HEADER_LENGTH_BYTES + header_bytes, file_bytes, exactly=False)
        text = file.read(header_bytes)
    data_start = HEADER_LENGTH_BYTES + header_bytes
    entries, data_bytes = _parse_header(path, text, data_start)
    _check_size(path, data_start + data_bytes, file_bytes, exactly=True)
    return entries


def _check_size(path: Path, wanted: int, found: int, *, exactly: bool) -> None:
    if found < wanted or (exactly and found > wanted):
        fault = "truncated" if found < wanted else "damaged"
        raise CheckpointError(
            f"{path} is {fault}: its header asks for {wanted} bytes, the file has {found}"
        )


def _parse_header(path: Path, text: bytes, data_start: int) -> tuple[dict[str, TensorEntry], int]:
    """Return a header's tensors, and the bytes that they take after the header."""
    entries: dict[str, TensorEntry] = {}
    spans = []
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for key, value in header.items():
            start, stop = value["data_offsets"]
            dtype, shape = value["dtype"], tuple(value["shape"])
            if dtype not in _TORCH_DTYPES:
                raise CheckpointError(f"{key} in {path} has dtype {dtype}, which is not supported")
            entries[key] = TensorEntry(path, data_start + start, _TORCH_DTYPES[dtype], shape)
            spans.append((start, stop, entries[key].num_bytes))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a header that cannot be read") from error
    end = 0
    for start, stop, num_bytes in sorted(spans):
        if start != end or stop - start != num_bytes:
            raise CheckpointError(f"{path} has a header whose offsets contradict its shapes")
        end = stop
    return entries, end


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
