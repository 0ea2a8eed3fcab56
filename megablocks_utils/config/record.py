"""A run's options as a file that `--config` reads back. Torch-free."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megablocks_utils.config.command import Command
from megablocks_utils.config.entry_points import SCRIPTS
from megablocks_utils.config.given import GivenOption
from megablocks_utils.config.option import Option
from megablocks_utils.config.run_config import OPTIONS, RunConfig
from megablocks_utils.config.secrets import is_secret_name
from megablocks_utils.config.yaml_file import format_options_file
from megablocks_utils.errors import ConfigurationError

__all__ = ["flatten_learned", "format_config", "format_record", "read_recorded_options"]

_FREE_OPTIONS = (
    *("output_dir", "overwrite_output_dir", "logging_steps", "report_to", "debug", "saving"),
    *("run_name", "project"),
    *("parallel", "entry_point", "verify_adapter", "resume_adapter"),
    *("lost_rank_timeout_s", "hang_timeout_s"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "sync_each_batch"),
    *("packing", "attn_implementation"),
    *("eval_strategy", "eval_steps", "per_device_eval_batch_size", "predict_samples"),
)
"""Options that change where or how a run is done, not what it learns."""


def format_config(config: RunConfig, leftovers: tuple[GivenOption, ...] = ()) -> str:
    """Return a configuration as YAML that `--config` reads back to an equal one.

    Args:
        config: The run.
        leftovers: Options that FSDP1 hands to TrainingArguments; secrets are left out.
    """
    passed_on = {
        given.name: given.values[0] if len(given.values) == 1 else given.values or "True"
        for given in leftovers
        if not given.is_null and not is_secret_name(given.name)
    }
    return format_record(asdict(config)) + format_options_file(passed_on)


def format_record(record: Mapping[str, Any]) -> str:
    """Return the `options` of a run.json as YAML that `--config` reads back.

    Args:
        record: `dataclasses.asdict` of a configuration.
    """
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    values = {
        option.name: _as_given(option, flat[option.name])
        for option in OPTIONS
        if option.name in flat
    }
    # Refused beside --use_megablocks_sharding False, where it means nothing.
    if not flat.get("use_megablocks_sharding"):
        values["expert_dp"] = None
    script: Command = SCRIPTS[record["entry_point"]]
    name = script.usage[0].split()[0]
    return f"# Options of {name}: --config this file.\n{format_options_file(values)}"


def read_recorded_options(path: Path) -> dict[str, Any]:
    """Read the `options` of a run.json.

    Raises:
        ConfigurationError: a file that cannot be read or holds no options.
    """
    wanted = "it must be the run.json of a run"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"--run is {path}, but it cannot be read ({error.strerror}); {wanted}."
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"--run is {path}, but that is no JSON; {wanted}.") from error
    options = record.get("options") if isinstance(record, dict) else None
    if not isinstance(options, dict) or options.get("entry_point") not in SCRIPTS:
        raise ConfigurationError(f"--run is {path}, but it holds no options of a run; {wanted}.")
    return options


def flatten_learned(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that change what is learned, by name, whatever section they are in.

    Args:
        options: `dataclasses.asdict` of a configuration, or what a file has kept of it.
    """
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if name not in _FREE_OPTIONS:
            flat |= flatten_learned(value) if isinstance(value, Mapping) else {name: value}
    return flat


def _as_given(option: Option, value: object) -> object:
    """Return what a file says of an option, for its value in a configuration."""
    if isinstance(value, list | tuple):
        return tuple(value) or ("none",)
    word = {meaning: word for word, meaning in option.translation.items()}.get(str(value), value)
    return word == "True" if option.is_switch and word in ("True", "False") else word
