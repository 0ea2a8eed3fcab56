"""Build a model without weights, and read its buffers from a checkpoint.

The order of a load: `build_model_on_meta`, `open_checkpoint`, `ModelLayout`, `check_against_model`
of `model_check` (before any weight is read), then `fill_buffers` and a `SliceReader` for the parts
that this rank holds. No function here communicates.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.checkpoint.json_file import MAX_WHOLE_NUMBER, read_settings, show_value
from megablocks_utils.checkpoint.quantization_config import drop_quantization, read_quantization
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.checkpoint.stored_names import NameMapping
from megablocks_utils.checkpoint.text_model import build_text_model, build_whole_model, cut_layers
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import GENERATION_CONFIG_NAME, MODEL_CONFIG_NAME
from megablocks_utils.moe.expert_spec import find_expert_modules

__all__ = [
    "build_model_on_meta",
    "fill_buffers",
    "find_other_parts",
]

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_RATE_NAMES = ("dropout", "_pdrop", "jitter_noise")


def build_model_on_meta(
    folder: str | Path, *, truncate_layers: int | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build the causal language model of a folder with its parameters on the meta device.

    Buffers (rotary frequencies) are real, as `from_pretrained` leaves them; no weight is read.

    Args:
        folder: local model folder.
        truncate_layers: keep only that many first layers (`--truncate_model_for_debug`).
        dtype: of what has none of its own, buffers too; None is that of the configuration.

    Raises:
        CheckpointError: no usable config.json, or not a model whose experts can be read.
    """
    folder = Path(folder)
    settings = read_settings(folder / MODEL_CONFIG_NAME, "model")
    if "model_type" not in settings:
        raise CheckpointError(f"{folder / MODEL_CONFIG_NAME} names no model_type")
    for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        _check_numbers(folder, part)
        _check_top_k(folder, part)
    read_quantization(folder)  # refuses what is not read here, before names look wrong
    with ForeignCode(lambda reason: _unusable(folder, reason)):
        config = _read_config(folder, truncate_layers)
        _set_dtype(config, dtype)
        model = build_text_model(config)
        model.tie_weights()
        # As `save_pretrained` does; a config may come without.
        model.config.architectures = [type(model).__name__]
        if (folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    if truncate_layers is None and not find_expert_modules(model):
        raise CheckpointError(
            f"model_type {settings['model_type']!r} in {folder / MODEL_CONFIG_NAME} has no experts"
            " that transformers' experts interface serves"
        )
    return model


def find_other_parts(folder: Path, keys: Iterable[str]) -> set[str]:
    """Return which stored tensors are of parts of a whole (vision, audio) beside its text model."""
    with ForeignCode(lambda reason: _unusable(folder, reason)):
        whole = build_whole_model(_read_config(folder, None))
    if whole is None:
        return set()
    state = whole.state_dict()
    targets = NameMapping(whole, state).targets(keys)
    return {key for key, target in targets.items() if target.name in state}


def _set_dtype(config: PreTrainedConfig, dtype: torch.dtype | None) -> None:
    """Say in which dtype to build, also to the text part, which is built by what itself says."""
    text = config.get_text_config(decoder=True)
    text.dtype = dtype or text.dtype or config.dtype
    config.dtype = dtype or config.dtype


def _read_config(folder: Path, truncate_layers: int | None) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(folder)
    drop_quantization(config)  # the model has floating-point weights, and is saved with them
    return config if truncate_layers is None else cut_layers(config, truncate_layers)


def fill_buffers(model: PreTrainedModel, reader: SliceReader) -> None:
    """Read the persistent buffers that are stored; every rank holds them whole."""
    for name in sorted(reader.layout.buffers - set(reader.layout.missing)):
        buffer = model.get_buffer(name)
        reader.fill_local(name, buffer, (0,) * buffer.dim())


def _unusable(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"the configuration in {folder} cannot be used: {reason}")


def _check_numbers(folder: Path, config: dict) -> None:
    """Refuse numbers that the first forward pass would fail on."""
    for name, value in config.items():
        if isinstance(value, int) and abs(value) > MAX_WHOLE_NUMBER:
            raise CheckpointError(
                f"{name} is {show_value(value)} in {folder / MODEL_CONFIG_NAME}, but it must be at "
                f"most {MAX_WHOLE_NUMBER}"
            )
        if value is None or not name.endswith(_RATE_NAMES):
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= 1:
            raise CheckpointError(
                f"{name} is {show_value(value)} in {folder / MODEL_CONFIG_NAME}, but it must be a "
                "number from 0 to 1"
            )


def _check_top_k(folder: Path, config: dict) -> None:
    """Refuse more experts a token than there are."""
    top_k = config.get("num_experts_per_tok")
    for name in _EXPERT_COUNTS:
        num_experts = config.get(name)
        if isinstance(top_k, int) and isinstance(num_experts, int) and top_k > num_experts:
            raise CheckpointError(
                f"num_experts_per_tok is {top_k} in {folder / MODEL_CONFIG_NAME}, but it must be "
                f"at most {name}, which is {num_experts}"
            )
