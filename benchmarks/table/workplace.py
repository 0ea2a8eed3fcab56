"""The model and the data that runs of the table read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

__all__ = ["save_config", "save_examples", "save_random_model"]

_FIRST_TOKEN = 3


def save_examples(path: Path, *, vocab_size: int, tokens: int, count: int) -> None:
    """Write tokenized examples of exactly so many random tokens, all of them labels."""
    generator = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            input_ids = generator.integers(_FIRST_TOKEN, vocab_size, tokens).tolist()
            lines.write(json.dumps({"input_ids": input_ids, "labels": input_ids}) + "\n")


def save_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write the `config.json` of a model without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    _build_config(config).save_pretrained(folder)


def save_random_model(config: Mapping[str, Any], folder: Path, *, dtype: torch.dtype) -> None:
    """Write a model with random weights, the same for every call."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(_build_config(config), dtype=dtype).save_pretrained(folder)


def _build_config(config: Mapping[str, Any]) -> Any:
    return AutoConfig.for_model(**config)
