"""`plan`: models, clusters and the records that `--check` reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.cases import Case, Expected, Mutation, show
from tests.fuzz.groups.model_config import CONFIG
from tests.fuzz.mutate import (
    MISSING,
    ODD_VALUES,
    RAW_JSON,
    SPECIAL_FILES,
    edit_json,
    json_mutations,
    put_in_place,
    set_value,
    write_text,
)

__all__ = ["check_cases", "plan_cases"]

NUM_RANDOM = 40
WORDS: dict[str, tuple[tuple[str, ...], Expected]] = {
    "--gpus": (("0", "-1", "x", "1e3", "9" * 20, "8,8", "", "3", "٣", "1_0"), "any"),
    "--gpu": (("x", "", "\udcff", "A100 " * 100), "refused"),
    "--gpu_mem_gib": (("nan", "-1", "0", "1e300", "inf", "x", "1e-300"), "any"),
    "--gpus_per_node": (("0", "-1", "3", "x", "9" * 20), "any"),
    "--imbalance": (("nan", "-1", "0", "1e300", "0.5", "x", "inf"), "any"),
    "--json": (("/nowhere/x", "", "/", "/dev/full", "\0", "a" * 300, "/proc/x"), "any"),
    "--plot": (("/nowhere/x.png", "", "/", "/dev/full", "x.zzz", "x", "\0"), "any"),
    "--calibration": (("/nowhere", "/dev/null", "/", "", "\0"), "refused"),
    "--max_seq_length": (("9" * 26, "1", "2", "0", "x", "1e9"), "any"),
    "--per_device_train_batch_size": (("9" * 23, "0", "-1", "x"), "any"),
    "--gradient_accumulation_steps": (("9" * 23, "0", "x"), "any"),
    "--ep_size": (("3", "9" * 11, "16", "0", "x", "٣"), "any"),
    "--lora_r": (("9" * 20, "0", "x"), "any"),
    "--expert_dp": (("x", ""), "refused"),
    "--check": (("", "/", "/nowhere", "\0", "/dev/zero", "/dev/null", "a" * 300), "refused"),
    "--use_lora": (("x", "", "all,none"), "refused"),
    "--precision": (("x", "", "fp8"), "refused"),
    "--zzz": (("1",), "refused"),
}
NUMBERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NUMBERS += ("num_key_value_heads", "num_experts_per_tok", "num_local_experts", "vocab_size")


def plan_cases(generator: Random) -> Iterator[Case]:
    """Yield odd fields of a model, odd clusters, and files that are no configuration."""

    def case(name: str, mutation: Mutation, expected: Expected = "any") -> Case:
        return Case("plan", name, "plan", mutations={"config": mutation}, expected=expected)

    for field in CONFIG:
        for odd in (*ODD_VALUES, float("nan"), float("inf"), -(10**12), 2**63):
            shown = "missing" if odd is MISSING else show(odd)
            if odd is MISSING and CONFIG[field] is None:
                continue
            may_be = odd is None or odd is MISSING or type(odd) is int
            is_refused = field in NUMBERS and not may_be
            change = edit_json(set_value((field,), odd))
            yield case(f"{field}={shown}", change, "refused" if is_refused else "any")
    for name, content in RAW_JSON.items():
        yield case(f"raw: {name}", write_text(content), "refused")
    for name, special in SPECIAL_FILES.items():
        yield case(f"file: {name}", put_in_place(special), "refused")
    for option, (values, expected) in WORDS.items():
        for value in values:
            yield Case("plan", f"{option} {show(value)}", "plan", words=(option, value),
                       expected=expected)  # fmt: skip
    for number in range(NUM_RANDOM):
        yield case(f"random {number}", _random_change(generator.randrange(2**32)))


def check_cases(generator: Random) -> Iterator[Case]:
    """Yield records of runs whose plan was changed."""

    def case(name: str, mutation: Mutation, expected: Expected = "any") -> Case:
        return Case("check", name, "check", mutations={"record": mutation}, expected=expected)

    for key in ("plan", "peaks", "options", "versions"):
        for number, odd in enumerate(ODD_VALUES):
            yield case(f"{key} {number}", edit_json(_set_if_there((key,), odd)))
    for part in ("predicted", "measured"):
        for number, odd in enumerate((*ODD_VALUES, 10**400, float("nan"), -5, "[bold]x")):
            for path in ((part,), (part, "peak_bytes"), (part, "components")):
                name = f"{'.'.join(path)} {number}"
                yield case(name, edit_json(_set_if_there(("plan", *path), odd)))
    for name, content in RAW_JSON.items():
        yield case(f"raw: {name}", write_text(content), "refused")
    for name, special in SPECIAL_FILES.items():
        yield case(f"file: {name}", put_in_place(special), "refused")
    huge = b'{"plan":{"predicted":{"peak_bytes":1e999},"measured":{"peak_bytes":1}}}'
    yield case("infinite", write_text(huge))
    for number in range(NUM_RANDOM):
        yield case(f"random {number}", _random_change(generator.randrange(2**32)))


def _set_if_there(path: tuple[str, ...], odd: Any) -> Any:
    def change(root: Any) -> None:
        for key in path[:-1]:
            root = root.get(key) if isinstance(root, dict) else None
        if isinstance(root, dict) and (odd is not MISSING or path[-1] in root):
            set_value(path[-1:], odd)(root)

    return change


def _random_change(seed: int) -> Mutation:
    def apply(path: Path) -> None:
        value = json.loads(path.read_text())
        ((_, _, change),) = json_mutations(value, Random(seed), 1)
        change(value)
        path.write_text(json.dumps(value))

    return apply
