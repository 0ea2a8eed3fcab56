"""Read training records from a file or a Hub dataset, each with where it came from.

A record keeps its place (``data.json:17``, or ``name, record 17`` where there are no lines), so
that every later error can name it.
"""

import json
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from megablocks_utils.checkpoint.library_output import without_datasets_bars
from megablocks_utils.errors import DataError

__all__ = ["Record", "read_records"]

FILE_SUFFIXES = (".json", ".jsonl", ".parquet")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
JSON_WHITESPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Record:
    """Hold one record's columns and where it was read.

    Attributes:
        place: ``file:line`` of the record's first character, or ``name, record n`` counted from 1.
        columns: the record as it was read.
    """

    place: str
    columns: dict[str, Any]


def read_records(data_path: str) -> list[Record]:
    """Read every record of a local ``.json``/``.jsonl``/``.parquet`` file or of a Hub dataset.

    A ``.json`` file is a list of records or, like ``.jsonl``, an object per line. What exists on
    disk is a file; what does not, and is shaped like ``name`` or ``owner/name``, is a Hub dataset,
    whose ``train`` split is read.

    Raises:
        DataError: the source is missing, empty or unreadable, or a line is not a JSON object.
    """
    path = Path(data_path)
    if path.is_dir():
        raise _source_error(f"data_path {data_path} is a folder, wanted a file ({_suffixes()})")
    if path.exists():
        records = _read_file(path)
    elif path.suffix in FILE_SUFFIXES or not HUB_NAME.fullmatch(data_path):
        raise _source_error(f"data_path {data_path} does not exist")
    else:
        records = _read_hub(data_path)
    if not records:
        raise _source_error(f"data_path {data_path} holds no records")
    return records


def _source_error(message: str) -> DataError:
    return DataError(message, parameters=("data_path",))


def _suffixes() -> str:
    return ", ".join(FILE_SUFFIXES)


def _read_file(path: Path) -> list[Record]:
    if path.suffix not in FILE_SUFFIXES:
        raise _source_error(f"data_path {path} must end in one of {_suffixes()}")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    if not text.strip():
        raise _source_error(f"data_path {path} is empty")
    is_list = path.suffix == ".json" and text.lstrip().startswith("[")
    values = _scan_list(text, path) if is_list else _scan_lines(text, path)
    return [_checked(f"{path}:{line}", value) for line, value in values]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _source_error(
            f"data_path {path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    except OSError as error:
        raise _source_error(f"data_path {path} cannot be read: {error.strerror}") from error


def _scan_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise _bad_json(path, number, error) from error


def _scan_list(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the elements of a JSON list with their lines (``json.load`` would lose them)."""
    try:
        yield from _list_elements(text)
    except json.JSONDecodeError as error:
        raise _bad_json(path, error.lineno, error) from error


def _list_elements(text: str) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder()
    position = _after_blanks(text, text.index("[") + 1)
    line, counted_to = 1, 0
    has_more = text[position : position + 1] != "]"
    while has_more:
        line += text.count("\n", counted_to, position)
        counted_to = position
        value, end = decoder.raw_decode(text, position)
        yield line, value
        position = _after_blanks(text, end)
        has_more = text[position : position + 1] == ","
        if has_more:
            position = _after_blanks(text, position + 1)
    if text[position : position + 1] != "]":
        raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    end = _after_blanks(text, position + 1)
    if end != len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _after_blanks(text: str, position: int) -> int:
    blanks = JSON_WHITESPACE.match(text, position)
    return blanks.end() if blanks else position


def _bad_json(path: Path, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(f"{path}:{line}: not valid JSON: {error.msg} at column {error.colno}")


def _checked(place: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a record must be a JSON object, this is {_json_type(value)}")
    return Record(place, value)


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _read_parquet(path: Path) -> list[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if path.stat().st_size == 0:
        raise _source_error(f"data_path {path} is empty")
    try:
        # Streaming reads the file itself; otherwise datasets copies it into its cache first.
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        return _numbered(str(path), rows)
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise _source_error(
            f"data_path {path} cannot be read as parquet: {_one_line(error)}"
        ) from error


def _read_hub(name: str) -> list[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    _check_hub_is_reachable(name)
    try:
        with without_datasets_bars():
            return _numbered(name, load_dataset(name, split="train"))
    except (DatasetsError, OSError, ValueError) as error:
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


def _numbered(name: str, rows: Iterable[dict[str, Any]]) -> list[Record]:
    return [Record(f"{name}, record {n}", dict(row)) for n, row in enumerate(rows, start=1)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
