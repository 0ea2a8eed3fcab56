"""Checkpoints whose manifest was changed and signed again, and the files that it lists."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.cases import Case, Expected, Mutation
from tests.fuzz.mutate import (
    ODD_VALUES,
    RAW_JSON,
    SPECIAL_FILES,
    byte_mutations,
    json_mutations,
    put_in_place,
    replace_file,
    set_value,
)

__all__ = ["manifest_cases"]

MANIFEST = "manifest.json"
NUM_RANDOM = 60
KEYS = ("step", "files", "format", "continuity", "world_size", "mesh", "options", "versions")
KEYS += ("train_runtime_s",)
OTHER_FILES = {
    "../": "../../../../../ground/tokens.jsonl",
    "absolute": "/dev/zero",
    "NUL": "a\0",
    "a long name": "a" * 5000,
    "not there": "nowhere",
    "the folder": ".",
}
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "text": lambda content: b"hello",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: b"\0" * len(content),
    "a pickle of None": lambda content: b"\x80\x04N.",
    "a pickle of code": lambda content: b"cposix\nsystem\n(S'touch pwned'\ntR.",
    "an empty list": lambda content: b"[]",
    "an empty object": lambda content: b"{}",
    "odd numbers": lambda content: b'{"step": "x"}\n{"step": 1e400}\n',
    "doubled": lambda content: content * 5,
}


def manifest_cases(generator: Random) -> Iterator[Case]:
    """Yield signed changes of the manifest and of every file, unsigned ones, and odd files."""

    def case(name: str, mutation: Mutation, expected: Expected = "same") -> Case:
        base = generator.choice(("resume", "resume", "export"))
        mutations = {"checkpoint": mutation}
        return Case("manifest", name, base, mutations=mutations, expected=expected)

    yield case("good", _signed(lambda manifest: None))
    for key in KEYS:
        for number, odd in enumerate(ODD_VALUES):
            yield case(f"{key} {number}", _signed(set_value((key,), odd)))
    for name, other in OTHER_FILES.items():
        entry = {"bytes": 1, "sha256": "0" * 64}
        yield case(f"lists {name}", _signed(set_value(("files", other), entry)), "refused")
    yield case("top a list", _signed(lambda manifest: []), "refused")
    for name, content in RAW_JSON.items():
        yield case(f"raw: {name}", replace_file(MANIFEST, content), "refused")
    for name, special in SPECIAL_FILES.items():
        yield case(f"file: {name}", put_in_place(special, MANIFEST), "refused")
    for number in range(NUM_RANDOM):
        yield case(f"random {number}", _random_change(generator.randrange(2**32)))
    for number in range(12):
        for name, damage in DAMAGE.items():
            yield case(f"file {number} {name}", _damage_file(number, damage), "any")
    for number in range(NUM_RANDOM // 3):
        yield case(f"file bytes {number}", _random_bytes(generator.randrange(2**32)), "any")
    for number in range(6):
        for name, special in SPECIAL_FILES.items():
            yield case(f"file {number}: {name}", _special_file(number, special), "refused")


def _signed(change: Callable[[Any], Any]) -> Mutation:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        changed = change(manifest)
        _sign(folder, manifest if changed is None else changed)

    return apply


def _sign(folder: Path, manifest: Any) -> None:
    if isinstance(manifest, dict):
        plain = {key: value for key, value in manifest.items() if key != "sha256"}
        text = json.dumps(plain, sort_keys=True).encode()
        manifest = plain | {"sha256": hashlib.sha256(text).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _random_change(seed: int) -> Mutation:
    def change(manifest: Any) -> None:
        ((_, _, apply),) = json_mutations(manifest, Random(seed), 1)
        apply(manifest)

    return _signed(change)


def _listed_file(folder: Path, number: int) -> Path:
    names = sorted(json.loads((folder / MANIFEST).read_text())["files"])
    return folder / names[number % len(names)]


def _damage_file(number: int, damage: Callable[[bytes], bytes]) -> Mutation:
    def apply(folder: Path) -> None:
        path = _listed_file(folder, number)
        _replace_and_sign(folder, path, damage(path.read_bytes()))

    return apply


def _random_bytes(seed: int) -> Mutation:
    def apply(folder: Path) -> None:
        generator = Random(seed)
        path = _listed_file(folder, generator.randrange(100))
        ((_, content),) = byte_mutations(path.read_bytes() or b"x", generator, 1)
        _replace_and_sign(folder, path, content)

    return apply


def _replace_and_sign(folder: Path, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"][path.name] = entry
    _sign(folder, manifest)


def _special_file(number: int, special: Mutation) -> Mutation:
    def apply(folder: Path) -> None:
        put_in_place(special)(_listed_file(folder, number))

    return apply
