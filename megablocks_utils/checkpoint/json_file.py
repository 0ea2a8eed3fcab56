"""Read JSON files that others may have written: whatever they hold, values or one sentence come.

`config.json` of a model, `adapter_config.json` of an adapter, an index of weights, a header of
safetensors, a manifest of a checkpoint. Python's own reader takes more than JSON (NaN, a name
twice) and fails in more ways than one; here all are a `CheckpointError` that names the file.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megablocks_utils.errors import CheckpointError

__all__ = ["JsonObject", "parse_json", "read_settings", "refuse_lfs_pointer", "show_value"]

MAX_BYTES = 100_000_000
MAX_WHOLE_NUMBER = 2**63 - 1
MAX_NUMBER = 1e300
_LFS_START = b"version https://git-lfs"
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SHOWN = 60


def read_settings(path: Path, kind: str) -> dict[str, Any]:
    """Return the settings in a file.

    Args:
        path: the file.
        kind: what messages call its folder, "model" or "adapter".

    Raises:
        CheckpointError: there is no such file, it cannot be read, or it is not a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"the {kind} folder {path.parent} has no {path.name}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise CheckpointError(f"{path} is no file of settings: it has over {MAX_BYTES:,} bytes")
    refuse_lfs_pointer(path, content)
    settings = parse_json(content, path)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds no settings: its JSON is not an object")
    return settings


def refuse_lfs_pointer(path: Path, content: bytes) -> None:
    """Refuse a file that only names the file that Git LFS would put in its place.

    Raises:
        CheckpointError: the content is such a pointer.
    """
    if content.startswith(_LFS_START):
        raise CheckpointError(
            f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull there, or"
            " download the repository with hf download"
        )


def parse_json(content: bytes, path: Path) -> Any:
    """Return the value that strict JSON has: UTF-8, finite numbers, every name once.

    Args:
        content: the bytes, of the whole file or of a part of it.
        path: the file, for messages.

    Raises:
        CheckpointError: it is not that.
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_object_of_pairs,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
        if _ESCAPED_SURROGATE.search(text):
            # A half of a surrogate pair cannot be printed, nor be the name of a file.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise CheckpointError(f"{path} is not valid JSON: it is nested too deeply") from error
    except UnicodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: its text is not UTF-8") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    return value


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{_show_name(twice)} is there twice")
    return values


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_SHOWN]} is too large")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


@dataclass(frozen=True)
class JsonObject:
    """Read an object of a JSON file name by name, each value with its type checked.

    Attributes:
        path: the file.
        values: the object.
        place: the names that lead to it, "" for the outermost object.
    """

    path: Path
    values: Mapping[str, Any]
    place: str = ""

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def optional(self, name: str) -> Any:
        """Return a value that may be null, but must be there."""
        return self._value(name, "a value or null")

    def text(self, name: str) -> str:
        """Return a text."""
        value = self._value(name, "a text")
        if isinstance(value, str):
            return value
        raise self._fault(name, value, "a text")

    def flag(self, name: str) -> bool:
        """Return true or false."""
        value = self._value(name, "true or false")
        if isinstance(value, bool):
            return value
        raise self._fault(name, value, "true or false")

    def whole_number(self, name: str, *, minimum: int = 0) -> int:
        """Return a whole number, `minimum` or more."""
        wanted = f"a whole number of {minimum} or more"
        value = self._value(name, wanted)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if is_whole and minimum <= value <= MAX_WHOLE_NUMBER:
            return value
        raise self._fault(name, value, wanted)

    def number(self, name: str, *, maximum: float = MAX_NUMBER) -> float:
        """Return a number from 0 to `maximum`."""
        wanted = f"a number from 0 to {maximum:g}"
        value = self._value(name, wanted)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and 0 <= value <= maximum:
            return value
        raise self._fault(name, value, wanted)

    def section(self, name: str) -> "JsonObject":
        """Return an object within this one."""
        value = self._value(name, "an object")
        if isinstance(value, dict):
            return JsonObject(self.path, value, self._place_of(name))
        raise self._fault(name, value, "an object")

    def sections(self) -> "Iterator[tuple[str, JsonObject]]":
        """Yield every value of this object, all of them objects, with its name."""
        for name in self.values:
            yield name, self.section(name)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of texts."""
        value = self._value(name, "a list of texts")
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise self._fault(name, value, "a list of texts")

    def _place_of(self, name: str) -> str:
        return f"{self.place} {_show_name(name)}".lstrip()

    def _value(self, name: str, wanted: str) -> Any:
        if name not in self.values:
            raise CheckpointError(f"{self.path} has no {self._place_of(name)}, wanted is {wanted}")
        return self.values[name]

    def _fault(self, name: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} has {self._place_of(name)} {show_value(value)}, wanted is {wanted}"
        )


def show_value(value: object) -> str:
    """Return a value as a message shows it, never all of a long one."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _show_name(name: str) -> str:
    is_plain = name.isprintable() and name.isascii() and len(name) <= _SHOWN
    return name if name and is_plain else show_value(name)
