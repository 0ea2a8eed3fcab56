"""Write what stands beside a model's weights: configuration, tokenizer, processors."""

import copy
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from megablocks_utils.checkpoint.folder_files import refuse_link_out
from megablocks_utils.checkpoint.json_file import read_settings
from megablocks_utils.checkpoint.library_errors import DiskErrorsAsOSErrors
from megablocks_utils.checkpoint.quantization_config import without_quantization
from megablocks_utils.files import GENERATION_CONFIG_NAME, MODEL_CONFIG_NAME

__all__ = ["COMPANIONS", "find_companions", "write_companions"]

_PROCESSORS = ("*preprocessor_config.json", "processor_config.json")
COMPANIONS = (
    *(GENERATION_CONFIG_NAME, "tokenizer*", "special_tokens_map.json", *_PROCESSORS),
    *("added_tokens.json", "chat_template*", "vocab.*", "merges.txt", "*.model"),
)
"""Files of a model that belong to it as much as its weights do, besides its config.json."""
_DTYPES = ("dtype", "torch_dtype")


def find_companions(folder: Path, patterns: Iterable[str] = COMPANIONS) -> list[Path]:
    """Return the files of a folder that belong to its model; none is a link out of it.

    Raises:
        CheckpointError: one is.
    """
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    paths = [path for path in found if path.is_file()]
    for path in paths:
        refuse_link_out(folder, path)
    return paths


def write_companions(
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    folder: Path,
    *,
    base: Path | None = None,
) -> None:
    """Write the other files of a model whose weights have a dtype.

    Args:
        config: of the model.
        generation_config: written too, if given.
        tokenizer: written too, if given.
        dtype: of the weights.
        folder: to write into.
        base: folder of the model that was trained, whose processors are copied; where it is more
            than its text model, its own config.json is kept but for dtypes.
    """
    has_config = base is not None and (base / MODEL_CONFIG_NAME).is_file()
    settings = read_settings(base / MODEL_CONFIG_NAME, "model") if base and has_config else None
    if settings is None or not _is_composite(settings, config):
        config = copy.deepcopy(config)
        config.dtype = dtype
        config.save_pretrained(folder)
    else:
        kept = _with_dtype(without_quantization(settings), dtype)
        text = json.dumps(kept, indent=2, ensure_ascii=False)
        (folder / MODEL_CONFIG_NAME).write_text(f"{text}\n", encoding="utf-8")
    if base is not None:
        for path in find_companions(base, _PROCESSORS):
            shutil.copyfile(path, folder / path.name)
    if generation_config is not None:
        # `save_pretrained` refuses settings that many published models carry.
        generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)
    if tokenizer is not None:
        with DiskErrorsAsOSErrors():
            tokenizer.save_pretrained(folder)


def _is_composite(settings: dict[str, Any], config: PreTrainedConfig) -> bool:
    """Return whether the base holds more than the config of a text model."""
    return settings.get("model_type") != config.model_type or bool(config.sub_configs)


def _with_dtype(settings: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a config with another dtype, of the whole and of its text model."""
    changed = dict(settings)
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in _DTYPES if key in settings] or [_DTYPES[0]]
    changed |= dict.fromkeys(keys, name)
    for part, value in settings.items():
        if part.startswith(("text", "llm", "language")) and isinstance(value, dict):
            changed[part] = _with_dtype(value, dtype)
    return changed
