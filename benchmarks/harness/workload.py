"""Random models and tokenized data that benchmarks train, the same for every call."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, PreTrainedConfig

from megablocks_utils.training.data.text import IGNORED_LABEL

_FIRST_TOKEN = 3
_PROMPT_SHARE = 0.4
_TYPICAL_TOKENS = 64


@dataclass(frozen=True)
class Workload:
    """Sizes of a Mixtral whose experts dominate, and of its data.

    Attributes:
        num_examples: of the data file, enough for all steps.
        shortest_tokens: of an example.
        longest_tokens: examples have between these many tokens, log-normal around 64, as short
            instructions have; the first 40 % of each is its prompt, without labels.
        global_batch: examples of an optimizer step, all ranks; at least a micro-batch of each.
        per_device_batch: examples of a micro-batch.
    """

    hidden_size: int = 512
    intermediate_size: int = 1408
    num_layers: int = 6
    num_experts: int = 8
    top_k: int = 2
    vocab_size: int = 8192
    num_examples: int = 1024
    shortest_tokens: int = 16
    longest_tokens: int = 192
    global_batch: int = 16
    per_device_batch: int = 4
    num_attention_heads: int = 8

    def build_config(self) -> MixtralConfig:
        """Return the model's configuration."""
        return MixtralConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=4,
            num_local_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            vocab_size=self.vocab_size,
            max_position_embeddings=1024,
        )


def build_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the configuration that a `config.json` with these fields describes."""
    return AutoConfig.for_model(**fields)


def save_model(
    config: PreTrainedConfig,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
) -> None:
    """Write a model with random weights as a Hub-format checkpoint."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def save_workload(workload: Workload, folder: Path) -> None:
    """Write model and data of a workload to `model` and `data.jsonl` in a folder."""
    save_model(workload.build_config(), folder / "model")
    save_data(workload, folder / "data.jsonl")


def save_data(workload: Workload, path: Path) -> None:
    """Write the tokenized examples of a workload."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(np.log(_TYPICAL_TOKENS), 0.6, workload.num_examples))
    lengths = lengths.astype(int).clip(workload.shortest_tokens, workload.longest_tokens)
    _save_random_tokens(path, generator, lengths, workload.vocab_size, _PROMPT_SHARE)


def save_equal_examples(path: Path, *, vocab_size: int, tokens: int, count: int) -> None:
    """Write `count` examples of exactly `tokens` tokens, all of them labels."""
    _save_random_tokens(path, np.random.default_rng(0), [tokens] * count, vocab_size, 0.0)


def _save_random_tokens(
    path: Path,
    generator: np.random.Generator,
    lengths: Iterable[int],
    vocab_size: int,
    prompt_share: float,
) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for length in lengths:
            input_ids = generator.integers(_FIRST_TOKEN, vocab_size, length).tolist()
            prompt = int(length * prompt_share)
            labels = [IGNORED_LABEL] * prompt + input_ids[prompt:]
            lines.write(json.dumps({"input_ids": input_ids, "labels": labels}) + "\n")
