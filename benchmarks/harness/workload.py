"""What the end-to-end benchmark trains: a random Mixtral whose experts dominate, and its data."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

_PROMPT_SHARE = 0.4
_TYPICAL_TOKENS = 64


@dataclass(frozen=True)
class Workload:
    """Sizes of the model and the data.

    Attributes:
        num_examples: of the data file, enough for all steps.
        longest_tokens: examples have between 16 and this many tokens, log-normal around 64, as
            short instructions have; the first 40 % of each is its prompt, without labels.
        global_batch: examples of an optimizer step, all ranks.
        per_device_batch: examples of a micro-batch.
    """

    hidden_size: int = 512
    intermediate_size: int = 1408
    num_layers: int = 6
    num_experts: int = 8
    top_k: int = 2
    vocab_size: int = 8192
    num_examples: int = 1024
    longest_tokens: int = 192
    global_batch: int = 16
    per_device_batch: int = 4


def save_model(workload: Workload, folder: Path) -> None:
    """Write the random model as a Hub-format checkpoint, the same for every call."""
    config = MixtralConfig(
        hidden_size=workload.hidden_size,
        intermediate_size=workload.intermediate_size,
        num_hidden_layers=workload.num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=workload.num_experts,
        num_experts_per_tok=workload.top_k,
        vocab_size=workload.vocab_size,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def save_data(workload: Workload, path: Path) -> None:
    """Write tokenized examples (`input_ids`, `labels`), the same for every call."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(np.log(_TYPICAL_TOKENS), 0.6, workload.num_examples))
    lengths = lengths.astype(int).clip(16, workload.longest_tokens)
    with path.open("w", encoding="utf-8") as lines:
        for length in lengths:
            input_ids = generator.integers(3, workload.vocab_size, length).tolist()
            prompt = int(length * _PROMPT_SHARE)
            labels = [-100] * prompt + input_ids[prompt:]
            lines.write(json.dumps({"input_ids": input_ids, "labels": labels}) + "\n")
