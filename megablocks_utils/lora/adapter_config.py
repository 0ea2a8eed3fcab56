"""Read an adapter's `adapter_config.json`, and refuse what is more than plain LoRA."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from megablocks_utils.checkpoint.settings_file import read_settings
from megablocks_utils.errors import CheckpointError
from megablocks_utils.lora.peft_format import CONFIG_FILE_NAME

__all__ = ["AdapterConfigFile", "read_adapter_config"]

# Settings of PEFT that are read here, or that say nothing about the weights in the file: which
# modules have adapters is seen from the tensors' names, and dropout only acts in training.
_READ = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern")
_WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "revision", "inference_mode", "peft_version", "runtime_config"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "lora_dropout", "init_lora_weights", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "qalora_group_size"),
)
# Ways to start an adapter that change the base weights as well.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfigFile:
    """Hold what an `adapter_config.json` says of the ranks and the strength of its adapters.

    Attributes:
        path: the file.
        r: rank, where `rank_pattern` says nothing else.
        lora_alpha: strength over the rank, where `alpha_pattern` says nothing else.
        rank_pattern: regular expression of the end of a module's name -> its rank.
        alpha_pattern: the same for its strength.
        base_model_name: the model that the adapter was trained on, if the file names it.
    """

    path: Path
    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model_name: str | None

    def rank(self, name: str) -> int:
        """Return the rank that PEFT gives the adapter of module or parameter `name`."""
        return self.rank_pattern.get(get_pattern_key(self.rank_pattern, name), self.r)

    def alpha(self, name: str) -> float:
        """Return the strength that PEFT gives the adapter of module or parameter `name`."""
        return self.alpha_pattern.get(get_pattern_key(self.alpha_pattern, name), self.lora_alpha)


def read_adapter_config(folder: Path) -> AdapterConfigFile:
    """Read and check `adapter_config.json` of an adapter folder.

    Settings that PEFT itself does not know are passed over, as PEFT does.

    Raises:
        CheckpointError: the file is missing or damaged, or asks for more than plain LoRA.
    """
    path = folder / CONFIG_FILE_NAME
    config = read_settings(path, "adapter")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} has peft_type {config.get('peft_type')!r}, wanted is 'LORA'")
    _refuse_more_than_plain_lora(path, config)
    base_model_name = config.get("base_model_name_or_path")
    if base_model_name is not None and not isinstance(base_model_name, str):
        raise CheckpointError(
            f"{path} has base_model_name_or_path {base_model_name!r}, wanted is a name"
        )
    r = _number(path, "r", config.get("r"), int)
    return AdapterConfigFile(
        path,
        r,
        _number(path, "lora_alpha", config.get("lora_alpha"), int | float),
        _pattern(path, "rank_pattern", config.get("rank_pattern"), int),
        _pattern(path, "alpha_pattern", config.get("alpha_pattern"), int | float),
        base_model_name or None,
    )


def _refuse_more_than_plain_lora(path: Path, config: dict) -> None:
    plain = LoraConfig().to_dict()
    for field in fields(LoraConfig):
        name, value = field.name, config.get(field.name)
        if not value or name in (*_READ, *_WITHOUT_EFFECT) or value == plain[name]:
            continue
        raise CheckpointError(
            f"{path} sets {name} to {value!r}, wanted is {plain[name]!r}: only plain LoRA is read"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{path} sets init_lora_weights to {start!r}, which changes the base weights too:"
            " save it as plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )


def _number(path: Path, name: str, value: object, kind: type) -> int | float:
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        wanted = "a whole number" if kind is int else "a number"
        raise CheckpointError(f"{path} has {name} {value!r}, wanted is {wanted} above 0")
    return value


def _pattern(path: Path, name: str, value: object, kind: type) -> dict[str, int | float]:
    if not isinstance(value, dict | None):
        raise CheckpointError(f"{path} has {name} {value!r}, wanted are names and numbers")
    for key, number in (value or {}).items():
        _number(path, f"{name} of {key}", number, kind)
        try:
            re.compile(key)
        except re.error as error:
            raise CheckpointError(
                f"{path} has {name} of {key!r}, which is not a regular expression: {error}"
            ) from error
    return value or {}
