"""What the configuration of a model says of quantized weights, and which kinds are read here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import is_compressed_tensors_available
from transformers.utils.quantization_config import (
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
)

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.checkpoint.json_file import read_settings, show_value
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import MODEL_CONFIG_NAME

__all__ = [
    "COMPRESSED_FORMATS",
    "COMPRESSED_TENSORS",
    "FP8_METHODS",
    "MXFP4",
    "Quantization",
    "build_quantizer",
    "drop_quantization",
    "load_dequantized",
    "read_quantization",
    "without_quantization",
]

MXFP4 = "mxfp4"
FP8_METHODS = ("fp8", "mxfp8")
COMPRESSED_TENSORS = "compressed-tensors"
_CONFIGS = (CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config)
_METHODS = (COMPRESSED_TENSORS, *FP8_METHODS, MXFP4)
COMPRESSED_FORMATS = MappingProxyType(
    {
        "pack-quantized": "weight_packed",
        "mxfp4-pack-quantized": "weight_packed",
        "int-quantized": "weight",
        "float-quantized": "weight",
        "naive-quantized": "weight",
        "mxfp8-quantized": "weight",
    }
)
"""Those of compressed-tensors that are read, and what holds the values of a weight there."""
_FORMATS_OF_GROUPS = ("mixed-precision", "dense")

_SETTING = "quantization_config"
# Other ways to say that weights are quantized: settings of config.json, and files beside it.
_OTHER_SETTINGS = ("compression_config", "quantization")
_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


@dataclass(frozen=True)
class Quantization:
    """Hold what a config.json says of its weights.

    Attributes:
        path: the config.json.
        method: its `quant_method`, one that is read here.
        settings: its `quantization_config`.
    """

    path: Path
    method: str
    settings: Mapping[str, Any]


def read_quantization(folder: Path) -> Quantization | None:
    """Return how a folder's weights are quantized; None if it does not say that they are.

    Raises:
        CheckpointError: in a way that is not read here.
    """
    path = folder / MODEL_CONFIG_NAME
    config = read_settings(path, "model") if path.is_file() else {}
    found = list(_find_settings(config))
    others = [f"{path} has {name}" for name in _OTHER_SETTINGS if config.get(name)]
    others += [f"{folder} has {name}" for name in _FILES if (folder / name).is_file()]
    for settings in found:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        if method not in _METHODS or settings != found[0]:
            kind = "" if method is None else f" (quant_method {show_value(method)})"
            raise _not_read(f"{path} has {_SETTING}{kind}")
        if method == COMPRESSED_TENSORS:
            _check_compressed(path, settings)
    if others:
        raise _not_read(others[0])
    return Quantization(path, found[0]["quant_method"], found[0]) if found else None


def build_quantizer(quantization: Quantization) -> HfQuantizer:
    """Return transformers' quantizer of a model, which knows its configuration.

    Raises:
        CheckpointError: the configuration cannot be used, or a package it needs is missing.
    """
    path, method = quantization.path, quantization.method
    if method == COMPRESSED_TENSORS and not is_compressed_tensors_available():
        raise CheckpointError(
            f"{path} has {_SETTING} (quant_method '{method}'), which is read with the package"
            f" {method} 0.15 or later, and that is not installed; install it with: pip install"
            f" {method}"
        )
    with ForeignCode(lambda why: CheckpointError(f"{_SETTING} in {path} cannot be used: {why}")):
        quantizer: HfQuantizer = AutoHfQuantizer.from_config(
            dict(quantization.settings), pre_quantized=True
        )
    return quantizer


def load_dequantized(folder: Path) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` dequantizes a folder, on any device.

    Raises:
        CheckpointError: as `read_quantization`.
    """
    quantization = read_quantization(folder)
    if quantization is None:
        return {}
    config = build_quantizer(quantization).quantization_config
    assert isinstance(config, _CONFIGS), "of the methods that are read"
    config.dequantize = True
    return {"quantization_config": config}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a config.json without what they say of quantized weights."""
    return {
        name: without_quantization(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name != _SETTING
    }


def drop_quantization(config: PreTrainedConfig) -> None:
    """Remove from a configuration, and from those in it, that weights are quantized."""
    if hasattr(config, _SETTING):
        delattr(config, _SETTING)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            drop_quantization(part)


def _find_settings(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yield each `quantization_config`: the model's own, and those of the models in it."""
    for name, value in config.items():
        if name == _SETTING and value:
            yield value
        elif isinstance(value, dict):
            yield from _find_settings(value)


def _not_read(found: str) -> CheckpointError:
    return CheckpointError(
        f"{found}: quantized weights are not read here in this form (read are"
        f" {join_words(_METHODS, 'and')}); give the model that was quantized, or one that"
        " transformers has dequantized (model.dequantize(), then save_pretrained)"
    )


def _check_compressed(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse what compressed-tensors has and this does not read, before its package is asked."""
    groups = settings.get("config_groups")
    is_table = isinstance(groups, dict) and all(isinstance(g, dict) for g in groups.values())
    if not groups or not is_table:
        raise CheckpointError(f"{path} has {_SETTING} without config_groups")
    formats = [settings.get("format"), *(group.get("format") for group in groups.values())]
    for value in formats:
        if value is not None and value not in (*COMPRESSED_FORMATS, *_FORMATS_OF_GROUPS):
            raise _not_read(f"{path} has {_SETTING} of format {show_value(value)}")
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise _not_read(f"{path} has {_SETTING} with a sparsity_config")
    if settings.get("transform_config"):
        raise _not_read(f"{path} has {_SETTING} with a transform_config")
