"""Write safetensors files one tensor at a time, and a model folder complete or not at all.

Names, shapes and dtypes are known in advance, so each file's header is written first and tensors
are appended as they come: no more than one is in memory. Everything is written into a hidden
folder inside the output folder and moved up by renames when all of it is on disk.
"""

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import torch

from megablocks_utils.checkpoint.safetensors_header import HEADER_LENGTH_BYTES
from megablocks_utils.checkpoint.saved_dtype import cast_in_range
from megablocks_utils.dtypes import DTYPES
from megablocks_utils.files import (
    MODEL_CONFIG_NAME,
    MODEL_INDEX_NAME,
    MODEL_WEIGHTS_NAME,
    STAGING_FOLDER_NAME,
    remove_path,
    replace_path,
    sync_to_disk,
)

__all__ = ["SafetensorsWriter", "TensorSpec", "staged_folder"]

WEIGHT_FILE_PATTERNS = (MODEL_WEIGHTS_NAME, "model-*-of-*.safetensors", MODEL_INDEX_NAME)
METADATA = {"format": "pt"}


class TensorSpec(NamedTuple):
    """Announce a tensor: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Return the tensor's size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Write announced tensors, in their announced order, to one or several safetensors files.

    A context manager: leaving it without an error checks that every tensor came, and writes the
    index file if there are several files. Every file is synced to disk when it is full.
    """

    def __init__(self, folder: Path, specs: Iterable[TensorSpec], *, max_shard_bytes: int):
        specs = list(specs)
        self._folder = folder
        self._shards = _plan_shards(specs, max_shard_bytes)
        self._pending = deque(
            (file_name, spec) for file_name, shard in self._shards.items() for spec in shard
        )
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error_type is not None:
            if self._file is not None:
                self._file.close()
            return
        self._finish_file()
        if self._pending:
            raise ValueError(f"{len(self._pending)} announced tensors were never written")
        if len(self._shards) > 1:
            self._write_index()

    def append(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor, cast to its announced dtype.

        Raises:
            CheckpointError: a value is beyond that dtype's range.
            ValueError: this is not the tensor that was announced for this place.
        """
        if not self._pending:
            raise ValueError(f"{name} {tuple(tensor.shape)} came after the last announced tensor")
        file_name, spec = self._pending.popleft()
        if (name, tuple(tensor.shape)) != (spec.name, tuple(spec.shape)):
            raise ValueError(f"{name} {tuple(tensor.shape)} came where {spec} was announced")
        flat = cast_in_range(name, tensor.detach(), spec.dtype).contiguous().view(-1)
        self._open_file(file_name).write(flat.view(torch.uint8).numpy().data)

    def _open_file(self, file_name: str) -> BinaryIO:
        """Return the file of this name, open, having finished the one before it."""
        path = self._folder / file_name
        if self._file is None or Path(self._file.name) != path:
            self._finish_file()
            self._file = path.open("wb")
            self._file.write(_header(self._shards[file_name]))
        return self._file

    def _finish_file(self) -> None:
        if self._file is not None:
            self._file.close()
            sync_to_disk(Path(self._file.name))
            self._file = None

    def _write_index(self) -> None:
        specs = [spec for shard in self._shards.values() for spec in shard]
        file_names = {spec.name: name for name, shard in self._shards.items() for spec in shard}
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(spec.shape) for spec in specs),
                "total_size": sum(spec.num_bytes for spec in specs),
            },
            "weight_map": dict(sorted(file_names.items())),
        }
        text = json.dumps(index, indent=2) + "\n"
        (self._folder / MODEL_INDEX_NAME).write_text(text, encoding="utf-8")


@contextmanager
def staged_folder(output_dir: Path, *, last: str = MODEL_CONFIG_NAME) -> Iterator[Path]:
    """Give a hidden folder to write into; on success its files replace those of `output_dir`.

    The file `last`, without which nothing loads the folder, is removed first and moved last, with
    a sync in between: a run that dies leaves the old files, or a folder that does not load. What a
    dead run left is removed when the next one starts. An error removes the hidden folder, unless
    all is written and only moving it fails.

    Args:
        output_dir: where the files end up; made if it does not exist.
        last: the file that makes the folder loadable.
    """
    staging = output_dir / STAGING_FOLDER_NAME
    if output_dir.is_dir():
        remove_path(staging)
    staging.mkdir(parents=True)
    is_written = False
    try:
        yield staging
        for path in (*staging.iterdir(), staging):
            sync_to_disk(path)
        is_written = True
    finally:
        if not is_written:
            with suppress(OSError):
                remove_path(staging)
    try:
        _publish(staging, output_dir, last)
    except OSError as error:
        reason = f"{error.strerror}; what could not be moved is complete in {staging}"
        raise OSError(error.errno, reason, error.filename) from error
    with suppress(OSError):
        remove_path(staging)


def _publish(staging: Path, output_dir: Path, last: str) -> None:
    names = sorted(path.name for path in staging.iterdir() if path.name != last)
    (output_dir / last).unlink(missing_ok=True)
    sync_to_disk(output_dir)
    for pattern in WEIGHT_FILE_PATTERNS:
        for path in output_dir.glob(pattern):
            path.unlink()
    for name in names:
        replace_path(staging / name, output_dir / name)
    sync_to_disk(output_dir)
    replace_path(staging / last, output_dir / last)
    sync_to_disk(output_dir)


def _plan_shards(specs: list[TensorSpec], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """Split tensors over files in order.

    A file ends when the next tensor would make it too large, or would start unaligned there.
    """
    shards: list[list[TensorSpec]] = [[]]
    num_bytes = 0
    for spec in specs:
        is_full = num_bytes + spec.num_bytes > max_shard_bytes or num_bytes % spec.dtype.itemsize
        if shards[-1] and is_full:
            shards.append([])
            num_bytes = 0
        shards[-1].append(spec)
        num_bytes += spec.num_bytes
    if len(shards) == 1:
        return {MODEL_WEIGHTS_NAME: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def _header(specs: Iterable[TensorSpec]) -> bytes:
    """Return a file's first bytes: the header's length and the header, padded to 8 bytes."""
    header: dict[str, object] = {"__metadata__": METADATA}
    offset = 0
    for spec in specs:
        offsets = [offset, offset + spec.num_bytes]
        dtype = DTYPES[str(spec.dtype).removeprefix("torch.")].safetensors_name
        header[spec.name] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_LENGTH_BYTES)
    return len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text
