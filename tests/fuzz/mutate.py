"""Ways to damage JSON, bytes and safetensors files."""

import json
import os
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.cases import Mutation

__all__ = ["ODD_VALUES", "RAW_JSON", "SPECIAL_FILES", "byte_mutations", "edit_json", "edit_weights"]
__all__ += ["MISSING", "join_weights", "json_mutations", "put_in_place", "replace_file"]
__all__ += ["set_value", "split_weights", "write_text"]

MISSING = object()
ODD_VALUES = (None, -1, 0, 1, "x", 3.5, 1e30, 10**12, 10**30, [], {}, True, [1, 2], "", MISSING)
DEEP = 100_000
RAW_JSON = {
    "empty": b"",
    "nul": b"\0",
    "list": b"[]",
    "null": b"null",
    "text": b'"x"',
    "number": b"1",
    "deep list": b"[" * DEEP + b"]" * DEEP,
    "deep object": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "cut deep": b"[" * DEEP,
    "a long number": b'{"a":' + b"9" * 5000 + b"}",
    "latin-1": b'{"a":"\xff"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "noise": bytes(range(256)),
    "lone surrogate": b'{"\\ud800": "\\udfff"}',
}
"""Contents that no JSON file of settings may have."""


def write_text(content: str | bytes) -> Mutation:
    """Replace a file by this content."""

    def apply(path: Path) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def edit_json(change: Callable[[Any], Any], name: str | None = None) -> Mutation:
    """Change a file's JSON, in place or into what is returned; `name`: a file of the folder."""

    def apply(path: Path) -> None:
        path = path if name is None else path / name
        value = json.loads(path.read_text())
        changed = change(value)
        path.write_text(json.dumps(value if changed is None else changed))

    return apply


def replace_file(name: str, content: bytes | None) -> Mutation:
    """Replace a file of a folder, or remove it."""

    def apply(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return apply


def _make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def _make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_in_place(special: Mutation, name: str | None = None) -> Mutation:
    """Put something special in the place of a file, or of a file of a folder."""

    def apply(path: Path) -> None:
        path = path if name is None else path / name
        path.unlink()
        special(path)

    return apply


SPECIAL_FILES: dict[str, Mutation] = {
    "a FIFO": os.mkfifo,
    "a folder": Path.mkdir,
    "a loop of links": _make_loop,
    "a link to a device": _make_device,
    "a broken link": lambda path: path.symlink_to("nowhere"),
    "not readable": lambda path: path.touch(0o000),
}
"""What may stand in a file's place."""


def set_value(path: tuple[Any, ...], value: Any) -> Callable[[Any], None]:
    """Return a change that sets or removes the value at a path of keys."""

    def change(root: Any) -> None:
        for key in path[:-1]:
            root = root[key]
        if value is MISSING:
            del root[path[-1]]
        else:
            root[path[-1]] = value

    return change


def json_mutations(
    value: Any, generator: Random, number: int
) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """Yield name, new value (`MISSING`: removed) and change of random places of a JSON value."""
    places = list(_places(value))
    for index in range(number):
        path = generator.choice(places)
        odd = generator.choice(ODD_VALUES)
        odd = odd if odd is MISSING else deepcopy(odd)
        where = ".".join(map(str, path))
        shown = "missing" if odd is MISSING else repr(odd)
        yield f"{index} {where}={shown}"[:90], odd, set_value(path, odd)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))[:3]
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def byte_mutations(content: bytes, generator: Random, number: int) -> Iterator[tuple[str, bytes]]:
    """Yield random flips, cuts, repetitions and insertions of a file's bytes."""
    for index in range(number):
        at = generator.randrange(len(content))
        kind = generator.choice(("flip", "cut", "drop", "insert", "double"))
        length = generator.choice((1, 1, 2, 8, 64))
        noise = bytes(generator.randrange(256) for _ in range(length))
        changed = {
            "flip": content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :],
            "cut": content[:at],
            "drop": content[:at] + content[at + length :],
            "insert": content[:at] + noise + content[at:],
            "double": content[: at + length] + content[at:],
        }
        yield f"{index} {kind} at {at}", changed[kind]


def split_weights(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_weights(header: Any, data: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file; `length`: what it says of its header's."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def edit_weights(name: str, change: Callable[[dict[str, Any], bytes], bytes]) -> Mutation:
    """Replace a safetensors file of a folder by what `change` makes of header and data."""

    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(*split_weights(path.read_bytes())))

    return apply
