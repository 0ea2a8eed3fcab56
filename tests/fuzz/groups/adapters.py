"""PEFT adapters: their configuration, and the tensors of their file."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.cases import Case, Expected, Mutation, show
from tests.fuzz.mutate import (
    DEEP,
    RAW_JSON,
    SPECIAL_FILES,
    edit_json,
    edit_weights,
    join_weights,
    json_mutations,
    put_in_place,
    replace_file,
    set_value,
)

__all__ = ["adapter_cases"]

SETTINGS, NAME = "adapter_config.json", "adapter_model.safetensors"
NUM_RANDOM = 40
BASES = ("adapter", "merge", "evaluate adapter")
VALUES: dict[str, tuple[tuple[Any, ...], Expected]] = {
    "r": ((0, -1, 3.5, "4", None, 5, 10**9, True, 10**30, [], float("nan")), "same"),
    "lora_alpha": ((0, -1, "x", None, True, [], 10**400, float("nan"), float("inf")), "same"),
    "rank_pattern": (([], "x", {"(": 1}, {"(a+)+$": 4}, {"q_proj": 0}, {"": 4}, 3), "same"),
    "alpha_pattern": (({"q_proj": "x"}, {"q_proj": float("nan")}, [], 3), "same"),
    "peft_type": (("X", None, [], 3, {}, "IA3", "ADALORA"), "refused"),
    "use_rslora": (("x", 3, [], None), "same"),
    "use_dora": ((True, "x"), "refused"),
    "bias": (("all", 3, [], None, "lora_only"), "same"),
    "fan_in_fan_out": ((True, "x"), "same"),
    "modules_to_save": ((["lm_head"], "x", 3), "same"),
    "target_modules": (("all-linear", None, 3, [], {}, [3], "(", "(a+)+$"), "same"),
    "target_parameters": (([], None, 3, "x", [3]), "same"),
    "init_lora_weights": (("pissa", "x", 3, None, "loftq"), "same"),
    "auto_mapping": (([{"base_model_class": "os.system"}], "x"), "same"),
    "base_model_name_or_path": ((3, "/etc", None, [], "a\0b"), "same"),
    "layers_to_transform": (([0], 0, "x", [99], -1, [[0]]), "same"),
    "layers_pattern": (("x", [], "("), "same"),
    "exclude_modules": ((["q_proj"], "x", "("), "same"),
    "unknown_zz": ((1, None, {}), "same"),
    "task_type": (("X", 3, None), "same"),
    "lora_bias": ((True, "x"), "same"),
    "peft_version": ((3, None, "99.0", [], "x" * 5000), "same"),
    "revision": (("x", 3), "same"),
    "inference_mode": ((False, "x"), "same"),
}


def adapter_cases(generator: Random) -> Iterator[Case]:
    """Yield every setting with odd values, damaged files, and odd tensors, for each reader."""

    def case(name: str, mutation: Mutation, expected: Expected = "same", **more: Any) -> Case:
        base = generator.choice(BASES)
        mutations = {"adapter": mutation}
        return Case("adapter", name, base, mutations=mutations, expected=expected, **more)

    for field, (values, expected) in VALUES.items():
        for value in values:
            yield case(
                f"{field}={show(value)}", edit_json(set_value((field,), value), SETTINGS), expected
            )
    for name, content in RAW_JSON.items():
        yield case(f"raw: {name}", replace_file(SETTINGS, content), "refused")
        yield case(f"weights raw: {name}", replace_file(NAME, content), "refused")
    for file in (SETTINGS, NAME):
        yield case(f"no {file}", replace_file(file, None), "refused")
        for name, special in SPECIAL_FILES.items():
            yield case(f"{file}: {name}", put_in_place(special, file), "refused")
    for name, change in _tensors().items():
        yield case(f"tensors: {name}", edit_weights(NAME, change), "refused")
    yield case("tensors: NaN", edit_weights(NAME, _with_nan), "refused", codes=(1, 2))
    for number in range(NUM_RANDOM):
        yield case(f"random {number}", _random_setting(generator.randrange(2**32)), "any")
    for name, words in {
        "output is the adapter": ("--output", "{inputs}/adapter"),
        "output is a file": ("--output", "{inputs}/adapter/adapter_config.json"),
        "output in a file": ("--output", "{inputs}/adapter/adapter_config.json/x"),
        "output NUL": ("--output", "a\0"),
        "output too long": ("--output", "a" * 300),
        "output empty": ("--output", ""),
        "adapter NUL": ("--adapter", "a\0"),
        "adapter empty": ("--adapter", ""),
        "no base": ("--model_name_or_path", "nowhere/x"),
    }.items():
        yield Case("adapter", name, "merge", words=words, expected="refused",
                   mutations={"adapter": lambda folder: None})  # fmt: skip


def _first(header: dict[str, Any]) -> str:
    return min(name for name in header if name != "__metadata__")


def _tensors() -> dict[str, Callable[[dict[str, Any], bytes], bytes]]:
    def entry(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., bytes]:
        return lambda h, d: join_weights({**h, _first(h): change(h[_first(h)])}, d)

    def renamed(new: str) -> Callable[..., bytes]:
        return lambda h, d: join_weights({new if n == _first(h) else n: e for n, e in h.items()}, d)

    return {
        "cut": lambda h, d: join_weights(h, d[:-1]),
        "header a list": lambda h, d: join_weights([], d),
        "none": lambda h, d: join_weights({}, b""),
        "deep": lambda h, d: join_weights(b"[" * DEEP, d),
        "exchanged shape": entry(lambda e: e | {"shape": e["shape"][::-1]}),
        "shape below 0": entry(lambda e: e | {"shape": [-n for n in e["shape"]]}),
        "shape of floats": entry(lambda e: e | {"shape": [float(n) for n in e["shape"]]}),
        "integers": entry(lambda e: e | {"dtype": "I32"}),
        "flat": entry(lambda e: e | {"shape": [e["shape"][0] * e["shape"][1]]}),
        "a number": entry(lambda e: e | {"shape": []}),
        "renamed": renamed("zz"),
        "of layer 99": renamed("base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight"),
        "named ../": renamed("../../x"),
    }


def _with_nan(header: dict[str, Any], data: bytes) -> bytes:
    start = header[_first(header)]["data_offsets"][0]
    return join_weights(header, data[:start] + struct.pack("<f", float("nan")) + data[start + 4 :])


def _random_setting(seed: int) -> Mutation:
    def apply(folder: Path) -> None:
        settings = json.loads((folder / SETTINGS).read_text())
        ((_, _, change),) = json_mutations(settings, Random(seed), 1)
        change(settings)
        (folder / SETTINGS).write_text(json.dumps(settings))

    return apply
