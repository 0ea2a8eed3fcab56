"""Read training records from a file or a dataset, each with where it came from.

A record keeps its place (``data.json:17``, or ``name, record 17`` where there are no lines), so
that every later error can name it.
"""

import re
import socket
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from megablocks_utils.checkpoint.library_output import without_datasets_bars
from megablocks_utils.errors import DataError
from megablocks_utils.training.data.arrow_rows import read_parquet, table_rows
from megablocks_utils.training.data.json_reader import scan_json
from megablocks_utils.training.data.text import json_type

__all__ = ["DatasetPart", "Record", "check_part", "read_records"]

FILE_SUFFIXES = (".json", ".jsonl", ".parquet")
COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4", ".zip")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SPECIAL_FILES = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True)
class Record:
    """Hold one record's columns and where it was read.

    Attributes:
        place: ``file:line`` of the record's first character, or ``name, record n`` counted from 1.
        columns: the record as it was read.
        pads_with_nulls: whether it comes from a typed table (parquet, a Hub dataset), where objects
            of one column share their keys, so that a null may stand for a key that is not there.
    """

    place: str
    columns: dict[str, Any]
    pads_with_nulls: bool = False


@dataclass(frozen=True)
class DatasetPart:
    """Say which part of a dataset is read; files have none.

    Attributes:
        config: its configuration; None for one that has no others.
        split: of it.
        is_streamed: whether it is read from where it is, and not kept on this machine first.
    """

    config: str | None = None
    split: str = "train"
    is_streamed: bool = False

    def describe(self) -> str:
        """Say it with the options' names; nothing of the whole of a dataset."""
        if self.config is not None:
            return f" (dataset_config {self.config}, dataset_split {self.split})"
        return "" if self.split == WHOLE.split else f" (dataset_split {self.split})"

    def arguments(self) -> dict[str, Any]:
        """Return it as arguments of `datasets.load_dataset`."""
        config = {} if self.config is None else {"name": self.config}
        return config | {"split": self.split} | ({"streaming": True} if self.is_streamed else {})


WHOLE = DatasetPart()


def check_part(data_paths: Sequence[str], part: DatasetPart) -> None:
    """Refuse a configuration or split where all sources are files, which have none.

    Raises:
        DataError: naming the option.
    """
    if (part.config, part.split) == (WHOLE.config, WHOLE.split):
        return
    if all(_is_file(Path(path)) for path in data_paths):
        has_config = part.config is not None
        name = "dataset_config" if has_config else "dataset_split"
        value = part.config if has_config else part.split
        raise DataError(
            f"{name} is {value}, but data_path {data_paths[0]} is a file, which has none: leave it "
            "out",
            parameters=(name, "data_path"),
        )


def read_records(data_path: str, part: DatasetPart = WHOLE) -> Iterator[Record]:
    """Yield every record of a local ``.json``/``.jsonl``/``.parquet`` file or of a dataset.

    A ``.json`` file is a list of records or, like ``.jsonl``, an object per line. A folder is what
    `datasets` finds in it. What is not on disk, and is shaped like ``name`` or ``owner/name``, is a
    Hub dataset. A FIFO, socket or device is never opened.

    Args:
        data_path: the source.
        part: what of a dataset is read.

    Raises:
        DataError: the source is missing, empty or unreadable, or a line is not a JSON object.
    """
    path = Path(data_path)
    mode = _file_mode(path)
    if mode is not None and stat.S_ISDIR(mode):
        records = _read_dataset(data_path, part)
    elif mode is not None:
        _check_kind(path, mode)
        records = _read_file(path)
    elif path.suffix in FILE_SUFFIXES or not HUB_NAME.fullmatch(data_path):
        raise _source_error(f"data_path {data_path} does not exist")
    else:
        _check_hub_is_reachable(data_path)
        records = _read_dataset(data_path, part)
    is_empty = True
    for record in records:
        is_empty = False
        yield record
    if is_empty:
        raise _source_error(f"data_path {data_path} holds no records")


def _source_error(message: str) -> DataError:
    return DataError(message, parameters=("data_path",))


def _suffixes() -> str:
    return ", ".join(FILE_SUFFIXES)


def _file_mode(path: Path) -> int | None:
    """Return the type and permissions of what is at ``path``; None if there is nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return None
    except OSError as error:
        raise _source_error(f"data_path {path} cannot be read: {error.strerror}") from error


def _check_kind(path: Path, mode: int) -> None:
    for is_kind, name in SPECIAL_FILES:
        if is_kind(mode):
            raise _source_error(f"data_path {path} is {name}, wanted a file ({_suffixes()})")


def _read_file(path: Path) -> Iterator[Record]:
    if path.suffix in COMPRESSED_SUFFIXES:
        raise _source_error(
            f"data_path {path} is compressed ({path.suffix}), wanted the file unpacked: "
            f"{_suffixes()}"
        )
    if path.suffix not in FILE_SUFFIXES:
        raise _source_error(f"data_path {path} must end in one of {_suffixes()}")
    if path.suffix == ".parquet":
        return _numbered(str(path), read_parquet(path))
    return (_checked(f"{path}:{line}", value) for line, value in scan_json(path))


def _checked(place: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a record must be a JSON object, this is {json_type(value)}")
    return Record(place, value)


def _is_file(path: Path) -> bool:
    return path.is_file() or path.suffix in FILE_SUFFIXES


def _read_dataset(name: str, part: DatasetPart) -> Iterator[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    is_local = Path(name).is_dir()
    try:
        with without_datasets_bars():
            found = str(Path(name).resolve()) if is_local else name
            dataset = load_dataset(found, **part.arguments())
            tables = dataset.with_format("arrow").iter(1000)
        yield from _numbered(name, (row for table in tables for row in table_rows(table, name)))
    except (
        DatasetsError,
        ArrowException,
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
    ) as error:
        if is_local:
            problem = f"is a folder, wanted a file ({_suffixes()}) or what datasets can load"
        else:
            problem = "is no local file and could not be loaded from the Hub"
        raise DataError(
            f"data_path {name} {problem}{part.describe()}: {_one_line(error)}",
            parameters=("data_path", "dataset_config", "dataset_split"),
        ) from error


def _check_hub_is_reachable(name: str) -> None:
    """Fail at once where the Hub has no address, which ``datasets`` retries for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        raise _source_error(
            f"data_path {name} is no local file and the Hub cannot be reached: {host} has no "
            "address here (HF_HUB_OFFLINE=True uses what has been downloaded before)"
        ) from error


def _numbered(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield Record(f"{name}, record {number}", row, pads_with_nulls=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
