"""What is known of a model family that neither its config nor its modules say.

transformers marks the modules that follow its experts interface, and the marks say what the experts
are. A few follow it in all but the mark. Of a few more a `config.json` can be planned from without
building a model. This is the only place that names a family.

Torch-free.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["READABLE_CONFIGS", "UNMARKED_EXPERTS", "ReadableConfig", "UnmarkedExperts"]


@dataclass(frozen=True)
class UnmarkedExperts:
    """Say of a class of experts what transformers' mark would have said.

    Attributes:
        is_transposed: whether its weights are stored (in, out).
        is_weighted_before: whether its block weights the tokens before the experts instead of the
            experts' results, and gives all tokens to all experts.
    """

    is_transposed: bool = False
    is_weighted_before: bool = False


UNMARKED_EXPERTS: Mapping[str, UnmarkedExperts] = MappingProxyType(
    {
        "Llama4TextExperts": UnmarkedExperts(is_transposed=True, is_weighted_before=True),
        "LongcatFlashExperts": UnmarkedExperts(),
        "Step3p7Experts": UnmarkedExperts(),
    }
)
"""Experts without the mark, by the name of their class."""


@dataclass(frozen=True)
class ReadableConfig:
    """Say what a plan needs beside a `config.json`, where it does not build the model.

    Attributes:
        defaults: transformers' own, of entries that may be absent; an entry that only some of these
            families have is read where it stands here.
        qk_norm: what is normalised of queries and keys: `none`, `head` or `whole`.
        routes_in_fp32: whether the routing weights reach the experts in fp32, whatever is computed
            in.
    """

    defaults: Mapping[str, Any]
    qk_norm: str = "none"
    routes_in_fp32: bool = True


_COMMON = {"hidden_size": 2048, "num_experts_per_tok": 8, "tie_word_embeddings": False}

READABLE_CONFIGS: Mapping[str, ReadableConfig] = MappingProxyType(
    {
        "mixtral": ReadableConfig(
            {
                **_COMMON,
                "vocab_size": 32000,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "num_experts_per_tok": 2,
                "num_local_experts": 8,
                "router_aux_loss_coef": 0.001,
            }
        ),
        "qwen3_moe": ReadableConfig(
            {
                **_COMMON,
                "vocab_size": 151936,
                "intermediate_size": 6144,
                "num_hidden_layers": 24,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "attention_bias": False,
                "sliding_window": 4096,
                "use_sliding_window": False,
                "decoder_sparse_step": 1,
                "moe_intermediate_size": 768,
                "num_local_experts": 128,
                "router_aux_loss_coef": 0.001,
            },
            qk_norm="head",
            routes_in_fp32=False,
        ),
        "olmoe": ReadableConfig(
            {
                **_COMMON,
                "vocab_size": 50304,
                "intermediate_size": 2048,
                "num_hidden_layers": 16,
                "num_attention_heads": 16,
                "attention_bias": False,
                "num_local_experts": 64,
                "router_aux_loss_coef": 0.01,
            },
            qk_norm="whole",
            routes_in_fp32=False,
        ),
        "deepseek_v3": ReadableConfig(
            {
                **_COMMON,
                "vocab_size": 129280,
                "hidden_size": 7168,
                "intermediate_size": 18432,
                "moe_intermediate_size": 2048,
                "num_hidden_layers": 61,
                "num_attention_heads": 128,
                "num_key_value_heads": 128,
                "attention_bias": False,
                "n_shared_experts": 1,
                "num_local_experts": 256,
                "kv_lora_rank": 512,
                "q_lora_rank": 1536,
                "qk_rope_head_dim": 64,
                "qk_nope_head_dim": 128,
                "v_head_dim": 128,
                "first_k_dense_replace": 3,
                "norm_topk_prob": True,
            }
        ),
    }
)
"""Families whose `config.json` says all that a plan asks, by `model_type`."""
