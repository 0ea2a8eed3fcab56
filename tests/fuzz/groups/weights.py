"""A model's safetensors file and the index of several."""

import json
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.cases import Case, Expected, Mutation, show
from tests.fuzz.mutate import (
    DEEP,
    RAW_JSON,
    SPECIAL_FILES,
    byte_mutations,
    edit_weights,
    join_weights,
    put_in_place,
    replace_file,
    split_weights,
    write_text,
)

__all__ = ["index_cases", "weights_cases"]

NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
NUM_RANDOM = 60
NOT_FINITE = (1, 2)
"""Exit codes of a run that meets values that are not finite."""

Header = dict[str, Any]

ENTRY_CHANGES: dict[str, dict[str, Any]] = {
    "offsets below 0": {"data_offsets": [-4, 60]},
    "offsets of 2^63": {"data_offsets": [2**63, 2**63 + 4]},
    "offsets of 2^64": {"data_offsets": [2**64, 2**64 + 8]},
    "offsets as floats": {"data_offsets": [0.0, 64.0]},
    "offsets as text": {"data_offsets": ["0", "4"]},
    "one offset": {"data_offsets": [0]},
    "three offsets": {"data_offsets": [0, 1, 2]},
    "no offsets": {"data_offsets": None},
    "offsets true": {"data_offsets": [False, True]},
    "offsets nan": {"data_offsets": [float("nan")] * 2},
    "shape as text": {"shape": "64"},
    "shape of text": {"shape": ["4"]},
    "shape null": {"shape": None},
    "shape 2^62": {"shape": [2**62, 2**62]},
    "shape true": {"shape": [True, 32, 32]},
    "shape nested": {"shape": [[32, 32]]},
    "shape an object": {"shape": {"64": 1}},
    "shape a number": {"shape": []},
    "dtype unknown": {"dtype": "F6_E2M3"},
    "dtype null": {"dtype": None},
    "dtype a list": {"dtype": ["F32"]},
    "dtype a number": {"dtype": 7},
    "dtype of integers": {"dtype": "I32"},
    "dtype of half": {"dtype": "F16"},
    "dtype of complex numbers": {"dtype": "C64"},
    "unknown key": {"strides": [1, 1]},
}
NO_ENTRIES: dict[str, Any] = {"null": None, "a list": [], "text": "x", "a number": 3, "empty": {}}


def weights_cases(generator: Random) -> Iterator[Case]:
    """Yield damaged headers and data, and random changes of the header's bytes."""

    def case(name: str, mutation: Mutation, expected: Expected = "refused", **more: Any) -> Case:
        base = generator.choice(("train", "evaluate"))
        return Case("weights", name, base, mutations={"model": mutation}, expected=expected, **more)

    for name, changes in ENTRY_CHANGES.items():
        expected: Expected = "any" if name == "unknown key" else "refused"
        yield case(name, _entry(lambda entry, c=changes: entry | c), expected)
    for name, entry in NO_ENTRIES.items():
        yield case(f"an entry is {name}", _entry(lambda _, e=entry: e))
    yield case("offsets exchanged", _entry(lambda e: e | {"data_offsets": e["data_offsets"][::-1]}))
    yield case("shape exchanged", _entry(lambda e: e | {"shape": e["shape"][::-1]}))
    yield case("shape below 0", _entry(lambda e: e | {"shape": [-n for n in e["shape"]]}))
    for name, whole in _whole_files().items():
        yield case(name, edit_weights(NAME, whole))
    yield from (case(n, edit_weights(NAME, c), x) for n, (c, x) in _named_tensors().items())
    for name, value in (("NaN", float("nan")), ("infinity", float("inf"))):
        content = edit_weights(NAME, lambda header, data, v=value: _with_value(header, data, v))
        yield case(f"{name} among the weights", content, codes=NOT_FINITE)
    for name, special in SPECIAL_FILES.items():
        yield case(f"file: {name}", put_in_place(special, NAME))
    yield case("only a .bin", lambda folder: (folder / NAME).rename(folder / "pytorch_model.bin"))
    yield case("none", replace_file(NAME, None))
    for number in range(NUM_RANDOM):
        yield case(f"random {number}", _random_header(generator.randrange(2**32)), "same")


def _entry(change: Callable[[Any], Any]) -> Mutation:
    """Change the entry of the largest two-dimensional tensor."""

    def apply(header: Header, data: bytes) -> bytes:
        sizes = {
            name: entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__" and len(set(entry["shape"])) == 2
        }
        name = max(sorted(sizes), key=lambda name: sizes[name])
        return join_weights({**header, name: change(header[name])}, data)

    return edit_weights(NAME, apply)


def _whole_files() -> dict[str, Callable[[Header, bytes], bytes]]:
    def text(header: Header) -> bytes:
        return json.dumps(header).encode()

    return {
        "length 0": lambda h, d: join_weights(h, d, 0),
        "length 2^63": lambda h, d: join_weights(h, d, 2**63),
        "length 2^64 - 1": lambda h, d: join_weights(h, d, 2**64 - 1),
        "length 100 million": lambda h, d: join_weights(h, d, 100_000_000),
        "length too small": lambda h, d: join_weights(h, d, len(text(h)) - 1),
        "length too large": lambda h, d: join_weights(h, d, len(text(h)) + 1),
        "empty": lambda h, d: b"",
        "seven bytes": lambda h, d: b"1234567",
        "zeros": lambda h, d: b"\0" * 100,
        "a byte short": lambda h, d: join_weights(h, d[:-1]),
        "a byte more": lambda h, d: join_weights(h, d + b"x"),
        "half the data": lambda h, d: join_weights(h, d[: len(d) // 2]),
        "header a list": lambda h, d: join_weights([], d),
        "header text": lambda h, d: join_weights(b'"x"', d),
        "header null": lambda h, d: join_weights(b"null", d),
        "header a number": lambda h, d: join_weights(b"1", d),
        "header empty": lambda h, d: join_weights({}, b""),
        "header deep": lambda h, d: join_weights(b"[" * DEEP + b"]" * DEEP, d),
        "header of deep objects": lambda h, d: join_weights(b'{"a":' * DEEP, d),
        "header noise": lambda h, d: join_weights(bytes(range(256)) * 4, d),
        "header UTF-16": lambda h, d: join_weights(json.dumps(h).encode("utf-16"), d),
        "header and more": lambda h, d: join_weights(text(h) + b" garbage", d),
        "header with a long number": lambda h, d: join_weights(
            text(h)[:-1] + b',"z":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}", d
        ),
        "pickle": lambda h, d: b"\x80\x04cos\nsystem\n" + b"x" * 100,
        "zip": lambda h, d: b"PK\x03\x04" + b"\0" * 1000,
        "LFS pointer": lambda h, d: (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
    }


def _named_tensors() -> dict[str, tuple[Callable[[Header, bytes], bytes], Expected]]:
    extra = {"dtype": "F32", "shape": [1]}

    def renamed(new: str) -> Callable[[Header, bytes], bytes]:
        return lambda h, d: join_weights({new if n == _last(h) else n: e for n, e in h.items()}, d)

    def added(new: str) -> Callable[[Header, bytes], bytes]:
        return lambda h, d: join_weights(
            {**h, new: extra | {"data_offsets": [len(d), len(d) + 4]}}, d + b"\0" * 4
        )

    return {
        "one renamed": (renamed("x"), "refused"),
        "one named ../": (renamed("../../x"), "refused"),
        "one named NUL": (renamed("\0"), "refused"),
        "one lacking": (lambda h, d: join_weights(*_without_last(h, d)), "refused"),
        "one more": (added("zz"), "refused"),
        "a bias more": (added("model.layers.0.self_attn.q_proj.bias"), "refused"),
        "a layer more": (added("model.layers.7.input_layernorm.weight"), "refused"),
        "two names for one place": (
            lambda h, d: join_weights({**h, "zz": h[_last(h)]}, d),
            "refused",
        ),
        "metadata a list": (lambda h, d: join_weights(h | {"__metadata__": []}, d), "same"),
        "metadata of numbers": (
            lambda h, d: join_weights(h | {"__metadata__": {"a": 1}}, d),
            "same",
        ),
        "no metadata": (lambda h, d: join_weights(_plain(h), d), "same"),
    }


def _plain(header: Header) -> Header:
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _last(header: Header) -> str:
    plain = _plain(header)
    return max(plain, key=lambda name: plain[name]["data_offsets"][1])


def _without_last(header: Header, data: bytes) -> tuple[Header, bytes]:
    changed = deepcopy(header)
    start, _ = changed.pop(_last(header))["data_offsets"]
    return changed, data[:start]


def _with_value(header: Header, data: bytes, value: float) -> bytes:
    start = header["model.layers.1.self_attn.q_proj.weight"]["data_offsets"][0]
    return join_weights(header, data[:start] + struct.pack("<f", value) + data[start + 4 :])


def _random_header(seed: int) -> Mutation:
    def apply(folder: Path) -> None:
        content = (folder / NAME).read_bytes()
        header, data = split_weights(content)
        ((_, changed),) = byte_mutations(json.dumps(header).encode(), Random(seed), 1)
        (folder / NAME).write_bytes(join_weights(changed, data))

    return apply


BAD_FILES = {
    "null": None,
    "a number": 3,
    "a list": ["a"],
    "an object": {},
    "empty": "",
    "the folder": ".",
    "NUL": "a\0b",
    "a long name": "a" * 5000,
    "a device": "/dev/zero",
    "a lone surrogate": "\udcff",
    "not there": "nowhere.safetensors",
    "../": f"../outside/{SHARD}",
    "./ and ../": f"./x/../../outside/{SHARD}",
    "absolute": "/etc/passwd",
    "~": f"~/{SHARD}",
}


def index_cases(generator: Random) -> Iterator[Case]:
    """Yield indexes whose files lead elsewhere, that do not fit, or that are no index."""

    def case(name: str, change: Callable[[Header], Any], expected: Expected = "refused") -> Case:
        base = generator.choice(("train", "evaluate"))
        return Case("index", name, base, mutations={"model": _indexed(change)}, expected=expected)

    def all_in(place: Any, number: int | None = None) -> Callable[[Header], Any]:
        return lambda index: {
            "weight_map": index["weight_map"]
            | dict.fromkeys(list(index["weight_map"])[:number], place)
        }

    yield case("good", lambda index: index, "same")
    for name, place in BAD_FILES.items():
        for number in (1, None):
            yield case(f"{number or 'all'} in {name}", all_in(place, number))
    for name, value in {
        "no map": {"metadata": {}},
        "map a list": {"weight_map": []},
        "map text": {"weight_map": "x"},
        "map empty": {"weight_map": {}},
        "map null": {"weight_map": None},
    }.items():
        yield case(name, lambda _, v=value: v)
    yield case("another size", lambda index: index | {"metadata": {"total_size": 1}}, "same")
    yield case("metadata text", lambda index: index | {"metadata": "x"})
    yield case("a name lacking", lambda index: _dropped(index), "same")
    yield case("a name more", lambda i: {"weight_map": i["weight_map"] | {"zz": SHARD}})
    for name, content in RAW_JSON.items():
        yield case(f"raw: {name}", lambda _, c=content: c)
    for name, special in SPECIAL_FILES.items():
        yield Case("index", f"file: {name}", "train", expected="refused",
                   mutations={"model": _with_special(special, INDEX_NAME)})  # fmt: skip
        yield Case("index", f"shard: {name}", "evaluate", expected="refused",
                   mutations={"model": _with_special(special, SHARD)})  # fmt: skip
    for number in range(12):
        yield Case("index", f"random {number}", "train",
                   mutations={"model": _random_index(generator.randrange(2**32))})  # fmt: skip
    yield Case("index", f"a shard outside, by a link {show(SHARD)}", "train", expected="any",
               mutations={"model": _link_out})  # fmt: skip


def _dropped(index: Header) -> Header:
    names = list(index["weight_map"])
    return {"weight_map": dict.fromkeys(names[:-1], SHARD)}


def _indexed(change: Callable[[Header], Any]) -> Mutation:
    def apply(folder: Path) -> None:
        header, _ = split_weights((folder / NAME).read_bytes())
        outside = folder.parent / "outside"
        outside.mkdir()
        (outside / SHARD).write_bytes((folder / NAME).read_bytes())
        (folder / NAME).rename(folder / SHARD)
        index = {"metadata": {}, "weight_map": dict.fromkeys(sorted(_plain(header)), SHARD)}
        changed = change(index)
        content = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        write_text(content)(folder / INDEX_NAME)

    return apply


def _with_special(special: Mutation, name: str) -> Mutation:
    def apply(folder: Path) -> None:
        _indexed(lambda index: index)(folder)
        put_in_place(special, name)(folder)

    return apply


def _random_index(seed: int) -> Mutation:
    def apply(folder: Path) -> None:
        _indexed(lambda index: index)(folder)
        ((_, changed),) = byte_mutations((folder / INDEX_NAME).read_bytes(), Random(seed), 1)
        (folder / INDEX_NAME).write_bytes(changed)

    return apply


def _link_out(folder: Path) -> None:
    _indexed(lambda index: index)(folder)
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(folder.parent / "outside" / SHARD)
