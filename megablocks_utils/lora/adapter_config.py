"""Read an adapter's `adapter_config.json`: every setting is used, has no effect, or is refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import peft
from peft import LoraConfig

from megablocks_utils.checkpoint.json_file import JsonObject, read_settings, show_value
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import ADAPTER_CONFIG_NAME

__all__ = ["AdapterConfigFile", "read_adapter_config"]

MAX_RANK = 1_000_000

# Settings of PEFT that say which adapters there are, and how strong they are.
_PATTERNS = ("rank_pattern", "alpha_pattern")
_FLAGS = ("use_rslora", "fan_in_fan_out")
_TARGETS = ("target_modules", "exclude_modules", "layers_pattern")  # a text, or some
_USED = (
    *("peft_type", "base_model_name_or_path", "bias", "modules_to_save", "target_parameters"),
    *("layers_to_transform", "r", "lora_alpha", *_PATTERNS, *_FLAGS, *_TARGETS),
)
# Settings that change nothing in what is merged or continued: notes; what acts in training only,
# where this run's options count; how new adapters begin; sizes beside a setting that is refused;
# what acts on tied weights only, whose adapters and replacements are refused.
_WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "revision", "inference_mode", "peft_version", "runtime_config"),
    *("lora_dropout", "init_lora_weights", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "qalora_group_size", "megatron_core", "velora_config"),
    "ensure_weight_tying",
)
# Beginnings of new adapters; and those that change the base weights as well.
_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class AdapterConfigFile:
    """Hold what an `adapter_config.json` says of its adapters.

    Attributes:
        path: the file.
        r: rank, where `rank_pattern` says nothing else.
        lora_alpha: strength over the rank, where `alpha_pattern` says nothing else.
        base_model_name: the model that the adapter was trained on, if the file names it.
        modules_to_save: last names of modules whose weights the file holds whole.
        has_biases: whether biases of the base were trained too.
        peft_version: the version of PEFT that wrote it, if it says so.
        targeting: what PEFT finds modules, ranks and strengths by, as arguments of `LoraConfig`.
    """

    path: Path
    r: int
    lora_alpha: float
    base_model_name: str | None
    modules_to_save: tuple[str, ...]
    has_biases: bool
    peft_version: str | None
    targeting: Mapping[str, Any]

    @property
    def use_rslora(self) -> bool:
        """Whether an adapter's strength is over the root of its rank."""
        return bool(self.targeting["use_rslora"])


def read_adapter_config(folder: Path) -> AdapterConfigFile:
    """Read and check `adapter_config.json` of an adapter folder.

    Raises:
        CheckpointError: the file is missing or damaged, or asks for more than LoRA.
    """
    path = folder / ADAPTER_CONFIG_NAME
    settings = read_settings(path, "adapter")
    if settings.get("peft_type") != "LORA":
        seen = show_value(settings.get("peft_type"))
        raise CheckpointError(f"{path} has peft_type {seen}, wanted is 'LORA'")
    config = JsonObject(path, settings)
    version = config.text("peft_version")[:20] if "peft_version" in config else None
    _refuse_more_than_lora(path, settings, version)
    rank = config.whole_number("r", minimum=1)
    if rank > MAX_RANK:
        raise CheckpointError(f"{path} has r {rank}, wanted is {MAX_RANK:,} at most")
    alpha = _read_positive(config, "lora_alpha")
    return AdapterConfigFile(
        path,
        r=rank,
        lora_alpha=alpha,
        base_model_name=_optional_text(config, "base_model_name_or_path"),
        modules_to_save=_optional_texts(config, "modules_to_save") or (),
        has_biases=_has_biases(config),
        peft_version=version,
        targeting={
            "r": rank,
            "lora_alpha": alpha,
            **{name: _read_pattern(config, name) for name in _PATTERNS},
            **{name: _text_or_texts(config, name) for name in _TARGETS},
            "target_parameters": _as_list(_optional_texts(config, "target_parameters")),
            "modules_to_save": _as_list(_optional_texts(config, "modules_to_save")),
            "layers_to_transform": _read_layers(config),
            **{name: name in config and config.flag(name) for name in _FLAGS},
        },
    )


def _refuse_more_than_lora(path: Path, settings: Mapping[str, Any], version: str | None) -> None:
    plain = LoraConfig().to_dict()
    known = {field.name for field in fields(LoraConfig)}
    for name, value in settings.items():
        if not value or name in (*_USED, *_WITHOUT_EFFECT):
            continue
        if name not in known:
            writer = "" if version is None else f" (PEFT {version} wrote the file)"
            raise CheckpointError(
                f"{path} sets {name} to {show_value(value)}, a setting that PEFT"
                f" {peft.__version__} does not have{writer}"
            )
        if value != plain[name]:
            raise CheckpointError(
                f"{path} sets {name} to {show_value(value)}, wanted is {plain[name]!r}: only"
                " plain LoRA is read"
            )
    method = settings.get("init_lora_weights")
    if isinstance(method, str) and method.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{path} sets init_lora_weights to {show_value(method)}, which changes the base weights"
            " too: save it as plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    if not (method is None or isinstance(method, bool) or method in _BEGINNINGS):
        raise CheckpointError(
            f"{path} sets init_lora_weights to {show_value(method)}, wanted is true, false or"
            f" one of {', '.join(_BEGINNINGS)}"
        )


def _read_positive(config: JsonObject, name: str) -> float:
    value = config.number(name)
    if value <= 0:
        raise CheckpointError(f"{config.path} has {name} {value}, wanted is a number above 0")
    return value


def _optional_text(config: JsonObject, name: str) -> str | None:
    return (config.text(name) or None) if name in config else None


def _optional_texts(config: JsonObject, name: str) -> tuple[str, ...] | None:
    return config.texts(name) if name in config else None


def _as_list(texts: tuple[str, ...] | None) -> list[str] | None:
    return list(texts) if texts else None


def _text_or_texts(config: JsonObject, name: str) -> str | list[str] | None:
    if isinstance(config.values.get(name), str):
        text = config.text(name)
        # A list would be compared with names, a text is a regular expression.
        return _check_expression(config, name, text) if text else None
    return _as_list(_optional_texts(config, name))


def _read_layers(config: JsonObject) -> int | list[int] | None:
    layers = config.values.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    numbers = layers if isinstance(layers, list) else [layers]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise CheckpointError(
            f"{config.path} has layers_to_transform {show_value(layers)}, wanted are numbers of"
            " layers"
        )
    return layers


def _has_biases(config: JsonObject) -> bool:
    value = config.values.get("bias") or "none"
    if value not in _BIASES:
        raise CheckpointError(
            f"{config.path} has bias {show_value(value)}, wanted is one of {', '.join(_BIASES)}"
        )
    return value != "none"


def _read_pattern(config: JsonObject, name: str) -> dict[str, float]:
    if name not in config:
        return {}
    pattern = config.section(name)
    for key in pattern.values:
        _check_expression(config, name, key)
    if name == "rank_pattern":
        return {key: pattern.whole_number(key, minimum=1) for key in pattern.values}
    return {key: _read_positive(pattern, key) for key in pattern.values}


def _check_expression(config: JsonObject, name: str, text: str) -> str:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{config.path} has {name} {show_value(text)}, which is not a regular expression:"
            f" {error}"
        ) from error
    return text
