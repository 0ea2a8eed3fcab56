"""Read JSON and JSON lines, each value with the line it begins on.

Python's own reader takes more than JSON allows (NaN; of two equal keys, the last). Both are refused
here, and so are numbers and nesting that Python cannot hold.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megablocks_utils.errors import DataError

__all__ = ["decode_json", "scan_json"]

JSON_WHITESPACE = re.compile(r"[ \t\r\n]*")


class _RefusedValueError(ValueError):
    """Report what Python's reader would take, but a record must not hold."""


def scan_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield every value of a ``.json`` or ``.jsonl`` file with its line.

    A ``.json`` file is a list of values, one object or, like ``.jsonl``, a value per line. Of a
    ``.jsonl`` file no more than a line is held in memory.

    Raises:
        DataError: the file cannot be read, is empty, or holds something else.
    """
    if path.suffix == ".jsonl":
        yield from _stream_lines(path)
        return
    text = _read_text(path)
    start = _after_blanks(text, 0)
    if start == len(text):
        raise _source_error(f"data_path {path} is empty")
    if text[start] == "[":
        yield from _scan_list(text, path, start)
        return
    line = 1 + text.count("\n", 0, start)
    value, end = _decode_at(text, start, path, line)
    if _after_blanks(text, end) == len(text):
        yield line, value
    else:
        yield from _scan_lines(text.split("\n"), path)


def decode_json(text: str, place: str) -> Any:
    """Return the one JSON value of ``text``.

    Raises:
        DataError: ``text`` is not valid JSON, with its place.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _bad_json(place, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: {_reason(error)}") from error


def _source_error(message: str) -> DataError:
    return DataError(message, parameters=("data_path",))


def _read_text(path: Path) -> str:
    try:
        return _decode_text(path.read_bytes(), path, 0)
    except OSError as error:
        raise _source_error(f"data_path {path} cannot be read: {error.strerror}") from error


def _decode_text(content: bytes, path: Path, position: int) -> str:
    """Return the text of a file, or of a part of it that begins at byte `position`."""
    try:
        return content.decode("utf-8" if position else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise _source_error(
            f"data_path {path} is not UTF-8 text: {error.reason} at byte {position + error.start}"
        ) from error


def _stream_lines(path: Path) -> Iterator[tuple[int, Any]]:
    is_empty = True
    for number, value in _scan_lines(_text_lines(path), path):
        is_empty = False
        yield number, value
    if is_empty:
        raise _source_error(f"data_path {path} is empty")


def _text_lines(path: Path) -> Iterator[str]:
    position = 0
    try:
        with path.open("rb") as file:
            for line in file:
                yield _decode_text(line, path, position)
                position += len(line)
    except OSError as error:
        raise _source_error(f"data_path {path} cannot be read: {error.strerror}") from error


def _scan_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, decode_json(line, f"{path}:{number}")


def _scan_list(text: str, path: Path, start: int) -> Iterator[tuple[int, Any]]:
    """Yield the elements of a JSON list with their lines (``json.load`` would lose them)."""
    position = _after_blanks(text, start + 1)
    line, counted_to = 1, 0
    has_more = text[position : position + 1] != "]"
    while has_more:
        line += text.count("\n", counted_to, position)
        counted_to = position
        value, end = _decode_at(text, position, path, line)
        yield line, value
        position = _after_blanks(text, end)
        has_more = text[position : position + 1] == ","
        if has_more:
            position = _after_blanks(text, position + 1)
    if text[position : position + 1] != "]":
        raise _bad_text("Expecting ',' or ']'", text, position, path)
    end = _after_blanks(text, position + 1)
    if end != len(text):
        raise _bad_text("Extra data", text, end, path)


def _decode_at(text: str, position: int, path: Path, line: int) -> tuple[Any, int]:
    """Return the value that begins at ``position``, and where it ends."""
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _bad_json(f"{path}:{error.lineno}", error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{line}: {_reason(error)}") from error


def _after_blanks(text: str, position: int) -> int:
    blanks = JSON_WHITESPACE.match(text, position)
    return blanks.end() if blanks else position


def _bad_text(message: str, text: str, position: int, path: Path) -> DataError:
    error = json.JSONDecodeError(message, text, position)
    return _bad_json(f"{path}:{error.lineno}", error)


def _bad_json(place: str, error: json.JSONDecodeError) -> DataError:
    what = error.msg.removesuffix(" at")
    return DataError(f"{place}: not valid JSON: {what} at column {error.colno}")


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply to be read"
    if isinstance(error, _RefusedValueError):
        return str(error)
    # What is left is Python's limit on the digits of a whole number.
    return "holds a whole number with more digits than can be read"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _RefusedValueError(f"the key {twice!r} is given twice in one object")
    return value


def _constant(name: str) -> Any:
    raise _RefusedValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
