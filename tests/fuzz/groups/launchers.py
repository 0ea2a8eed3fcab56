"""What launchers set in the environment, whole and in part, and Accelerate's own settings."""

from collections.abc import Iterator
from random import Random

from tests.fuzz.cases import Case, Expected, show

__all__ = ["launcher_cases"]

ONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29999",
}
"""Of one process that a launcher started."""
SECOND = {"RANK": "1", "LOCAL_WORLD_SIZE": "1"}
"""The first process of a second machine."""
NUMBERS = ("", "x", "-1", "1.5", "٣", "9" * 20, "1", " 0 ", "0x0", "True")
VALUES: dict[str, tuple[tuple[str, ...], Expected]] = {
    **dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), (NUMBERS, "any")),
    "MASTER_PORT": (("", "x", "-1", "0", "99999", "٣", "9" * 20), "any"),
    "TORCHELASTIC_RESTART_COUNT": (("x", "", "-1", "9" * 20), "any"),
    "TORCHELASTIC_MAX_RESTARTS": (("x", ""), "any"),
    "GROUP_RANK": (("x", "-1"), "any"),
    "ACCELERATE_MIXED_PRECISION": (("fp16", "bf16", "fp8", "x", "no", ""), "any"),
    "ACCELERATE_USE_DEEPSPEED": (("true", "x", "1"), "any"),
    "ACCELERATE_USE_FSDP": (("true", "x", "false"), "any"),
    "ACCELERATE_USE_MEGATRON_LM": (("true",), "any"),
    "ACCELERATE_DYNAMO_BACKEND": (("inductor", "x", "no", "eager"), "any"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("4", "x", "auto"), "any"),
    "ACCELERATE_USE_CPU": (("true", "x"), "any"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (("true",), "any"),
    "PARALLELISM_CONFIG_TP_SIZE": (("2", "x"), "any"),
    "ACCELERATE_USE_TP": (("true",), "any"),
    "FSDP_OFFLOAD_PARAMS": (("true", "x"), "any"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (("true", "x"), "any"),
    "FSDP_SHARDING_STRATEGY": (("SHARD_GRAD_OP", "x", "9"), "any"),
    "FSDP_VERSION": (("2", "x", "9"), "any"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("true",), "any"),
    "FSDP_AUTO_WRAP_POLICY": (("NO_WRAP", "SIZE_BASED_WRAP", "x"), "any"),
    "FSDP_STATE_DICT_TYPE": (("FULL_STATE_DICT", "x"), "any"),
}


def launcher_cases(generator: Random) -> Iterator[Case]:
    """Yield each variable lacking or odd, of one process and of two."""

    def case(name: str, environ: dict[str, str | None], expected: Expected = "any") -> Case:
        base = generator.choice(("train", "fsdp1"))
        return Case("launcher", name, base, environ=environ, expected=expected)

    yield case("one process", dict(ONE), "same")
    for name in ONE:
        expected: Expected = "any" if name == "LOCAL_WORLD_SIZE" else "refused"
        yield case(f"no {name}", {**ONE, name: None}, expected)
        yield case(f"only {name}", {name: ONE[name]}, "any" if "MASTER" in name else "same")
    for name, (values, expected) in VALUES.items():
        for value in values:
            yield case(f"{name}={show(value)}", {**ONE, name: value}, expected)
    two = {**ONE, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, changes in {
        "rank 2 of 2": {"RANK": "2"},
        "local rank 5 of 2": {"LOCAL_RANK": "5"},
        "an address nobody has": {**SECOND, "MASTER_ADDR": "nowhere.invalid"},
        "an empty address": {**SECOND, "MASTER_ADDR": ""},
        "an address with spaces": {**SECOND, "MASTER_ADDR": "a b"},
        "a port of text": {"MASTER_PORT": "x"},
        "a port too large": {"MASTER_PORT": "99999"},
        "a port of others": {"MASTER_PORT": "1"},
    }.items():
        yield case(name, {**two, **changes}, "refused")
