"""Tiny random MoE models of every supported family, and folders that hold them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

FAMILIES = ("mixtral", "qwen3_moe", "olmoe")
"""Those that `shard_moe` supports; `FAMILY_CONFIGS` has one more."""
SHARD_SIZE = "100KB"

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILY_CONFIGS = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 96, "head_dim": 16, "norm_topk_prob": True},
    ),
    "olmoe": (OlmoeConfig, {"num_experts": 4}),
    "gpt_oss": (GptOssConfig, {"num_local_experts": 4, "head_dim": 16}),
}


def build_tiny_model(family: str, *, seed: int = 0, **overrides) -> PreTrainedModel:
    """Build a tiny fp32 model: hidden 64, intermediate 96, 2 layers, 4 experts, top-2.

    Weights are seeded and random enough (standard deviation 0.1, norms around 1) that experts and
    rows differ clearly. `overrides` are options of the family's config.
    """
    config_class, family_options = FAMILY_CONFIGS[family]
    model = AutoModelForCausalLM.from_config(config_class(**COMMON | family_options | overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            center = 1.0 if parameter.dim() == 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(center + noise)
    return model.eval()


def save_tiny_model(
    family: str,
    folder: str | Path,
    *,
    sharded: bool = True,
    fused: bool = False,
    prepare: Callable[[PreTrainedModel], None] | None = None,
    **overrides,
) -> PreTrainedModel:
    """Write a tiny model with transformers' own `save_pretrained`, and return it.

    Args:
        family: one of `FAMILIES`.
        folder: where to.
        sharded: several files and an index, or one file.
        fused: experts as in memory (`save_original_format=False`), or in the family's Hub layout.
        prepare: changes the weights in place before they are written.
        overrides: as for `build_tiny_model`.
    """
    model = build_tiny_model(family, **overrides)
    if prepare is not None:
        prepare(model)
    max_shard_size = SHARD_SIZE if sharded else "5GB"
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=not fused)
    return model


def edit_config(folder: str | Path, **changes) -> None:
    """Change entries of a saved model's config.json."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
