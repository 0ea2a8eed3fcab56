"""Tiny values of the fields of transformers' configs: rules by name, and what no rule can know."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["NUM_EXPERTS", "NUM_LAYERS", "VOCAB_SIZE", "exceptions", "value_of_field"]

NUM_EXPERTS, NUM_LAYERS, VOCAB_SIZE = 8, 4, 128

_ATTENTION_ROWS = (
    (r"num_attention_heads|n_heads|num_heads|encoder_attention_heads", 4),
    (r"num_key_value_heads|num_kv_heads|num_global_key_value_heads", 2),
    (r"head_dim|global_head_dim|attention_head_dim|v_head_dim|qk_nope_head_dim", 16),
    (r"qk_rope_head_dim", 8),
    (r"q_lora_rank", 32),
    (r"(kv|o)_lora_rank", 16),
    (r"index_topk", 512),
    (r"index_(n_heads|num_heads)", 2),
    (r"index_head_dim", 16),
    (r"sliding_window", 8),
    (r"max_position_embeddings", 512),
)
_MIXER_ROWS = (
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"linear_(key_|value_)?head_dim", 16),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_d_state|ssm_state_size", 16),
    (r"mamba_chunk_size|chunk_size", 16),
    (r"mamba_n_groups|n_groups", 2),
    (r"mamba_dt_rank", 8),
)
_EXPERT_ROWS = (
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", NUM_EXPERTS),
    (r"num_experts_per_tok|moe_top_k|moe_topk|top_k_experts|moe_k", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    # Not half of the hidden size, so that a turned weight has another shape.
    (r"(\w+_)?intermediate_size(_mlp)?|(expert_)?ffn_hidden_size", 48),
    (r"moe_hidden_size|moe_latent_size|router_hidden_size", 32),
    (r"n_group", 2),
    (r"topk_group", 1),
    (r"first_k_dense_(replace|layers)|num_dense_layers|moe_layer_start_index", 1),
    (r"swiglu_limit", 1.0),
    (r"router_jitter_noise|input_jitter_noise|moe_jitter_eps", 0.0),
)
_MODEL_ROWS = (
    (r"(padded_)?vocab_size|vocab_size_per_layer_input", VOCAB_SIZE),
    (r"hidden_size|d_model|dim|embed_dim|n_embd", 64),
    (r"(out|text|projector|projection)_hidden_(size|dim)", 64),
    (r"(projector|adapter|vision)_(input|output|in|out)_(dim|size)", 64),
    (r"hidden_size_per_layer_input|gated_norm_rank", 8),
    (r"num_hidden_layers|n_layers|num_layers|depth", NUM_LAYERS),
    (r"(num_nextn_predict|mtp_num_hidden)_layers", 0),
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r"(attention_|hidden_)?dropout|(resid|attn)_pdrop", 0.0),
)
_RULES = tuple(
    (re.compile(pattern), value)
    for pattern, value in (*_MODEL_ROWS, *_EXPERT_ROWS, *_ATTENTION_ROWS, *_MIXER_ROWS)
)

_MROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Kinds of layers, sizes that hang together, and what is off by default.
_EXCEPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "dbrx": {
            "n_layers": NUM_LAYERS,
            "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
        },
        "deepseek_v4": {
            "num_key_value_heads": 1,
            "head_dim": 32,
            "o_groups": 2,
            "hc_mult": 2,
            "layer_types": [
                "sliding_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
                "sliding_attention",
            ],
            "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
            "compress_rates": {
                "compressed_sparse_attention": 2,
                "heavily_compressed_attention": 4,
            },
        },
        "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
        "dots3_note_text": {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 32,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 24,
            "swa_qk_nope_head_dim": 16,
            "swa_v_head_dim": 16,
        },
        "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"] * 2},
        "ernie4_5_moe": {"moe_layer_end_index": 3},
        "ernie4_5_vl_moe_text": {
            "moe_intermediate_size": [48, 16],
            "rope_parameters": {**_MROPE, "mrope_section": [2, 2, 4]},
        },
        "gemma4_text": {
            "enable_moe_block": True,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
        },
        "glm4v_moe_text": {
            "rope_parameters": {
                **_MROPE,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            }
        },
        "glm5_next_text": {
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "index_kpool": 2,
            "hc_mult": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
        "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
        "inkling_text": {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "sliding_window_size": 8,
            "rel_extent": 64,
            "d_rel": 4,
        },
        "jamba": {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        "jetmoe": {"kv_channels": 16, "num_key_value_heads": 4},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
        "llama4_text": {
            "interleave_moe_layer_step": 1,
            "moe_layers": None,
            "attention_chunk_size": 16,
            "no_rope_layers": [1, 1, 1, 0],
        },
        "longcat_flash": {
            "zero_expert_num": 2,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "head_dim": 8,
        },
        "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 16},
        "muse_spark": {"out_hidden_size": 64, "projector_hidden_size": 64},
        "muse_spark_audio": {"hidden_sizes": [8, 16, 32, 64]},
        "nemotron_h_omni": {"audio_config": None},  # its published form has a field of its own
        "nemotron_h": {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        },
        "qwen3_omni_moe_audio_encoder": {
            "d_model": 80,
            "encoder_layers": 2,
            "encoder_ffn_dim": 32,
            "output_dim": 64,
            "num_mel_bins": 16,
            "downsample_hidden_size": 16,
        },
        "qwen3_omni_moe_vision_encoder": {"deepstack_visual_indexes": [0, 1]},
        "qwen4_exp_text": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 512,
            "indexer_compress_ratio": 4,
            "hc_count": 2,
            "hc_lowrank": 16,
            "ple_layer_ids": [1],
            "ple_embed_dim": 16,
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 2,
        },
        "zaya": {"num_experts_per_tok": 1},
    }
)


def value_of_field(name: str) -> Any:
    """Return the tiny value of a field, by the first rule for its name; None for no rule."""
    return next((value for pattern, value in _RULES if pattern.fullmatch(name)), None)


def exceptions(model_type: str) -> Mapping[str, Any]:
    """Return what the rules do not know of a family."""
    return _EXCEPTIONS.get(model_type, {})
