"""The command lines of the training scripts, read into a `RunConfig`. Torch-free."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from megablocks_utils.config.adapter import (
    DEFAULT_LORA_ALPHA,
    DEFAULT_LORA_R,
    NO_LORA,
    ROUTER,
    AdapterConfig,
    parts_of,
    targets_of,
)
from megablocks_utils.config.command import Command
from megablocks_utils.config.contradictions import check_together
from megablocks_utils.config.evaluation import EvaluationConfig
from megablocks_utils.config.given import CommandLine, GivenOption
from megablocks_utils.config.model import DataConfig, ModelConfig
from megablocks_utils.config.optim import OptimConfig
from megablocks_utils.config.parallel import ParallelConfig
from megablocks_utils.config.precision import PrecisionConfig, check_dtype
from megablocks_utils.config.reader import build_section, refuse_unknown, scan_words
from megablocks_utils.config.run_config import OPTIONS, RunConfig
from megablocks_utils.config.saving import SavingConfig
from megablocks_utils.errors import ConfigurationError

__all__ = [
    "SCRIPTS",
    "check_leftovers",
    "parse_args",
    "parse_known_args",
    "read_run_options",
]

SCRIPTS: Mapping[str, Command] = MappingProxyType(
    {
        "fsdp2": Command(
            usage=("train_accelerate_fsdp2.py [--option value | --option=value] ...",),
            options=OPTIONS,
            closing=(),
        ),
        "fsdp1": Command(
            usage=("train_fsdp1.py [--option value | --option=value] ...",),
            options=OPTIONS,
            closing=("All other options of transformers.TrainingArguments are taken too.",),
        ),
    }
)
"""The training scripts by entry point."""


def parse_args(argv: Sequence[str], *, entry_point: str) -> RunConfig:
    """Read all options of a run; an unknown one is an error that names the nearest known one.

    Args:
        argv: The words after the script's name.
        entry_point: "fsdp2" or "fsdp1".

    Raises:
        ConfigurationError: for an option, value or combination that cannot work.
        HelpRequested: for `--help`.
    """
    line = scan_words(argv, SCRIPTS[entry_point])
    refuse_unknown(line.given, SCRIPTS[entry_point].names)
    return read_run_options(line, entry_point)[0]


def parse_known_args(
    argv: Sequence[str], *, entry_point: str
) -> tuple[RunConfig, tuple[GivenOption, ...]]:
    """Read the options of a run and return those that are left for TrainingArguments.

    The caller passes these to `check_leftovers` with TrainingArguments' field names, so that a
    misspelt option is still named.

    Raises:
        ConfigurationError: for an option, value or combination that cannot work.
        HelpRequested: for `--help`.
    """
    return read_run_options(scan_words(argv, SCRIPTS[entry_point]), entry_point)


def read_run_options(
    line: CommandLine, entry_point: str
) -> tuple[RunConfig, tuple[GivenOption, ...]]:
    """Build the configuration from options that were given, and return those that are not its own.

    Raises:
        ConfigurationError: for a value or combination that cannot work.
    """
    given = [given for given in line.given if given.option is not None]
    leftovers = tuple(given for given in line.given if given.option is None)
    _check_no_dtype_flags(leftovers)
    return _build_config(CommandLine((), tuple(given)).read_values(), entry_point), leftovers


def check_leftovers(leftovers: Iterable[GivenOption], trainer_names: Collection[str]) -> None:
    """Refuse options left for TrainingArguments that it does not know either.

    Args:
        leftovers: What `parse_known_args` returned second.
        trainer_names: Names of TrainingArguments' fields, without dashes.

    Raises:
        ConfigurationError: naming the unknown option, and what it probably means.
    """
    refuse_unknown(leftovers, {*SCRIPTS["fsdp1"].names, *trainer_names})


def _check_no_dtype_flags(leftovers: Iterable[GivenOption]) -> None:
    """Refuse Hugging Face's `--bf16` and `--fp16`: dtypes come from `--precision` alone."""
    for given in leftovers:
        is_set = not given.is_null and [value.lower() for value in given.values] != ["false"]
        if given.name in ("bf16", "fp16") and is_set:
            error = ConfigurationError(
                f"{given.flag} is given, but dtypes come from --precision; use --precision fp32, "
                "mixed, bf16_sr or bf16."
            )
            raise given.located(error)


def _build_config(given: Mapping[str, Any], entry_point: str) -> RunConfig:
    values: dict[str, Any] = {option.name: option.default for option in OPTIONS}
    values |= given
    check_together(values, entry_point)
    if values["use_scattermoe"]:
        values["kernel"] = "scattermoe"
    own_expert_dp = "replicate" if entry_point == "fsdp1" else "shard"
    values["expert_dp"] = values["expert_dp"] or own_expert_dp
    targets = targets_of(values)
    if values["sync_each_batch"] is None:
        values["sync_each_batch"] = targets == NO_LORA
    if values["freeze_router"] is None:
        values["freeze_router"] = targets != NO_LORA and ROUTER not in parts_of(targets)
    if values["resume_adapter"] is None:
        values["lora_r"] = values["lora_r"] or DEFAULT_LORA_R
        values["lora_alpha"] = values["lora_alpha"] or DEFAULT_LORA_ALPHA
    values["report_to"] = tuple(word for word in values["report_to"] if word != "none")
    precision = build_section(PrecisionConfig, values)
    check_dtype(precision)
    sections = {
        "model": build_section(ModelConfig, values),
        "data": build_section(DataConfig, values),
        "parallel": build_section(ParallelConfig, values),
        "adapter": build_section(AdapterConfig, values),
        "precision": precision,
        "optim": build_section(OptimConfig, values),
        "saving": build_section(SavingConfig, values),
        "evaluation": build_section(EvaluationConfig, values),
    }
    return build_section(RunConfig, values | sections | {"entry_point": entry_point})
