"""Read an adapter's `adapter_config.json`, and refuse anything but plain LoRA."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from megablocks_utils.checkpoint.json_file import read_settings
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import ADAPTER_CONFIG_NAME

__all__ = ["AdapterConfigFile", "read_adapter_config"]

# Settings of PEFT that are read here, and those that say nothing about the weights in the file:
# the tensors' names tell which modules have adapters, and dropout only acts in training.
_READ = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern")
_WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "revision", "inference_mode", "peft_version", "runtime_config"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "lora_dropout", "init_lora_weights", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "qalora_group_size"),
)
# Initialisations of an adapter that change the base weights as well.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_Number = TypeVar("_Number", int, float)


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
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)

    def alpha(self, name: str) -> float:
        """Return the strength that PEFT gives the adapter of module or parameter `name`."""
        pattern = get_pattern_key(list(self.alpha_pattern), name)
        return self.alpha_pattern.get(pattern, self.lora_alpha)


def read_adapter_config(folder: Path) -> AdapterConfigFile:
    """Read and check `adapter_config.json` of an adapter folder.

    Settings that PEFT itself does not know are ignored, as PEFT ignores them.

    Raises:
        CheckpointError: the file is missing or damaged, or asks for more than plain LoRA.
    """
    path = folder / ADAPTER_CONFIG_NAME
    config = read_settings(path, "adapter")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} has peft_type {config.get('peft_type')!r}, wanted is 'LORA'")
    _refuse_more_than_plain_lora(path, config)
    base_model_name = config.get("base_model_name_or_path")
    if base_model_name is not None and not isinstance(base_model_name, str):
        raise CheckpointError(
            f"{path} has base_model_name_or_path {base_model_name!r}, wanted is a name"
        )
    return AdapterConfigFile(
        path,
        r=_read_whole_number(path, "r", config.get("r")),
        lora_alpha=_read_number(path, "lora_alpha", config.get("lora_alpha")),
        rank_pattern=_read_pattern(path, "rank_pattern", config, _read_whole_number),
        alpha_pattern=_read_pattern(path, "alpha_pattern", config, _read_number),
        base_model_name=base_model_name or None,
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
    method = config.get("init_lora_weights")
    if isinstance(method, str) and method.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{path} sets init_lora_weights to {method!r}, which changes the base weights too:"
            " save it as plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )


def _read_whole_number(path: Path, name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _wrong_number(path, name, value, "a whole number")
    return value


def _read_number(path: Path, name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong_number(path, name, value, "a number")
    if not math.isfinite(value) or value <= 0:
        raise _wrong_number(path, name, value, "a number")
    return value


def _wrong_number(path: Path, name: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"{path} has {name} {value!r}, wanted is {wanted} above 0")


def _read_pattern(
    path: Path,
    name: str,
    config: Mapping[str, object],
    read: Callable[[Path, str, object], _Number],
) -> dict[str, _Number]:
    pattern = config.get(name)
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{path} has {name} {pattern!r}, wanted are names and numbers")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise CheckpointError(
                f"{path} has {name} of {key!r}, which is not a regular expression: {error}"
            ) from error
    return {key: read(path, f"{name} of {key}", number) for key, number in pattern.items()}
