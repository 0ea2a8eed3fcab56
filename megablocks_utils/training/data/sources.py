"""Read training records from a file or a Hub dataset, each with where it came from.

A record keeps its place (``data.json:17``, or ``name, record 17`` where there are no lines), so
that every later error can name it.
"""

import re
import socket
import stat
from collections.abc import Iterable, Iterator
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

__all__ = ["Record", "read_records"]

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


def read_records(data_path: str) -> Iterator[Record]:
    """Yield every record of a local ``.json``/``.jsonl``/``.parquet`` file or of a Hub dataset.

    A ``.json`` file is a list of records or, like ``.jsonl``, an object per line. What exists on
    disk is a file; what does not, and is shaped like ``name`` or ``owner/name``, is a Hub dataset,
    whose ``train`` split is read. A FIFO, socket or device is never opened.

    Raises:
        DataError: the source is missing, empty or unreadable, or a line is not a JSON object.
    """
    path = Path(data_path)
    mode = _file_mode(path)
    if mode is not None:
        _check_kind(path, mode)
        records = _read_file(path)
    elif path.suffix in FILE_SUFFIXES or not HUB_NAME.fullmatch(data_path):
        raise _source_error(f"data_path {data_path} does not exist")
    else:
        records = _read_hub(data_path)
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
    if stat.S_ISDIR(mode):
        raise _source_error(f"data_path {path} is a folder, wanted a file ({_suffixes()})")
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


def _read_hub(name: str) -> Iterator[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    _check_hub_is_reachable(name)
    try:
        with without_datasets_bars():
            tables = load_dataset(name, split="train").with_format("arrow").iter(1000)
        yield from _numbered(name, (row for table in tables for row in table_rows(table, name)))
    except (DatasetsError, ArrowException, OSError, ValueError, RuntimeError) as error:
        raise _source_error(
            f"data_path {name} is no local file and could not be loaded from the Hub: "
            f"{_one_line(error)}"
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
