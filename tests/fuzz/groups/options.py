"""Options of the training scripts: each with odd values, and pairs of them."""

from collections.abc import Iterator
from itertools import combinations
from random import Random

from megablocks_utils.config import DataConfig
from megablocks_utils.config.entry_points import SCRIPTS
from megablocks_utils.config.option import Option, list_options
from tests.fuzz.cases import Case, Expected, show

__all__ = ["option_cases", "pair_cases"]

NO_NUMBERS = (
    *("", " ", "abc", "nan", "inf", "1e400", "٣", "1_0", "0x10", "½", "\udcff", "1,5", "True"),
    *("--", "1 2", "[1]", "1e", "−1"),
)
NUMBERS = ("-1", "0", "-0", "+1", "1.5", "1e-320", "007")
ENDLESS = ("99999999999999999999", "1e300", "9" * 400)
NO_BOOLEANS = ("", "yes", "1", "none", "\udcff", "Tru", "True,False")
NO_CHOICES = ("", "zzz", "1", "\udcff", "zzz none", "a" * 300)
NO_PATHS = ("", "\x00", "/dev/null", "/", "a" * 300, "../../../etc/passwd", "~nouser/x", "a/b/c")
NO_PATHS += ("http://x/y", ".", "\udcff", "hf://x", "C:\\x", "*", "$HOME", "-x")
NO_FOLDERS = ("", "\x00", "/proc/x", "a" * 300, "/dev/null", "/dev/null/x", "\udcff", "/")
CONTEXT = {
    "ep_size": ("--use_megablocks_sharding", "True"),
    "expert_dp": ("--use_megablocks_sharding", "True"),
    "lora_r": ("--use_lora", "all"),
    "lora_alpha": ("--use_lora", "all"),
    "resume_adapter": ("--use_lora", "all"),
    "verify_adapter": ("--use_lora", "attn-only"),
    "save_steps": ("--save_strategy", "steps"),
    "save_total_limit": ("--save_strategy", "steps", "--save_steps", "1"),
    "num_train_epochs": ("--max_steps", "-1"),
}
"""What else must be given for an option to mean something."""
MEANINGFUL = {
    "use_megablocks_sharding": ("True",),
    "kernel": ("eager", "grouped_mm", "triton"),
    "use_scattermoe": ("True",),
    "use_lora": ("attn-only", "mlp-only", "all"),
    "verify_adapter": ("True", "False"),
    "verify_kernel": ("False",),
    "precision": ("mixed", "bf16_sr", "bf16"),
    "dtype": ("bfloat16",),
    "optim_dtype": ("bfloat16",),
    "truncate_model_for_debug": ("True",),
    "shuffle": ("False",),
    "sync_each_batch": ("True", "False"),
    "gradient_checkpointing": ("False", "selective"),
    "overwrite_output_dir": ("True",),
    "ignore_plan": ("True",),
    "save_strategy": ("steps", "epoch"),
    "async_save": ("True",),
    "debug": ("True",),
    "expert_dp": ("shard", "replicate"),
    "max_seq_length": ("8",),
    "router_aux_loss_coef": ("0", "0.5"),
    "resume_from_checkpoint": ("True",),
}
"""Values that mean something, whose pairs may contradict each other."""
FREE_TEXT = ("data_path", "model_name_or_path", "resume_from_checkpoint", "resume_adapter")
FREE_TEXT += ("chat_template",)


def option_cases(generator: Random) -> Iterator[Case]:
    """Yield every option of both scripts with odd values."""
    for option in SCRIPTS["fsdp2"].options:
        for value, expected in _odd_values(option):
            base = generator.choice(("train", "train", "train", "fsdp1"))
            yield Case(
                "options",
                f"{option.name}={show(value)}",
                base,
                words=(*CONTEXT.get(option.name, ()), f"--{option.name}", value),
                expected=expected,
                codes=(1, 2) if value in ENDLESS else (2, 3),  # 1: values that are not finite
            )
    yield from _evaluate_cases()


def pair_cases(generator: Random) -> Iterator[Case]:
    """Yield every pair of options that could contradict each other."""
    names = {option.name for option in SCRIPTS["fsdp2"].all_options}
    items = [(n, value) for n, values in MEANINGFUL.items() if n in names for value in values]
    for (first, value), (second, other) in combinations(items, 2):
        if first != second:
            yield Case(
                "pairs",
                f"{first}={value} {second}={other}",
                generator.choice(("train", "train", "fsdp1")),
                words=(f"--{first}", value, f"--{second}", other),
                expected="any",
            )


def _odd_values(option: Option) -> Iterator[tuple[str, Expected]]:
    if option.name == "output_dir":
        yield from ((value, "any") for value in NO_FOLDERS)
    elif option.name in FREE_TEXT:
        yield from ((value, "refused") for value in NO_PATHS)
    elif option.kind == "boolean":
        yield from ((value, "refused") for value in NO_BOOLEANS)
    elif option.choices:
        yield from ((value, "refused") for value in NO_CHOICES)
    elif option.kind in ("integer", "number"):
        yield from ((value, "refused") for value in NO_NUMBERS)
        yield from ((value, "any") for value in NUMBERS)
        is_endless = option.name in ("max_steps", "num_train_epochs")
        yield from ((value, "refused" if is_endless else "any") for value in ENDLESS)
    else:
        yield from ((value, "any") for value in dict.fromkeys((*NO_CHOICES, *NO_PATHS)))


def _evaluate_cases() -> Iterator[Case]:
    for option in list_options(DataConfig):
        if option.name == "shuffle":
            continue
        for value, expected in _odd_values(option):
            name = f"evaluate {option.name}={show(value)}"
            words = (f"--{option.name}", value)
            yield Case("options", name, "evaluate", words=words, expected=expected)
    for value in ("", "\x00", "/", "/dev/null", "a/b/c", "nowhere"):
        yield Case("options", f"evaluate adapter={show(value)}", "evaluate",
                   words=("--adapter", value), expected="refused")  # fmt: skip
