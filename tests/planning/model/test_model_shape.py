"""Shapes read from a config.json are those of the model that transformers builds from it."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.planning.model import config_defaults
from megablocks_utils.planning.model.config_values import KNOWN_MODEL_TYPES
from megablocks_utils.planning.model.model_shape import ModelShape
from tests.planning.cases import read_model

# By hand: 2 x 32000 x 4096 + 4096, and in each of 32 layers 2 x 4096^2 + 2 x 1024 x 4096 +
# 8 x 4096 + 2 x 4096 + 8 x 3 x 14336 x 4096.
MIXTRAL = 46_702_792_704
# Published, without the layer that predicts a second token.
DEEPSEEK, QWEN_SMALL, QWEN_LARGE = 671_026_404_352, 30_532_122_624, 235_093_634_560
SMALL = {"num_hidden_layers": 2, "vocab_size": 96}


def build_on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize(
    "config",
    [
        read_model("mixtral-8x7b"),
        read_model("qwen3-30b-a3b"),
        {"model_type": "deepseek_v3", "num_hidden_layers": 4},  # three dense layers, then one MoE
        {"model_type": "olmoe", "intermediate_size": 1024},  # OLMoE-1B-7B
        *({"model_type": family} | SMALL for family in KNOWN_MODEL_TYPES),
        {"model_type": "mixtral", "head_dim": 96, "num_key_value_heads": 2} | SMALL,
        {"model_type": "mixtral", "num_experts": 4} | SMALL,
        {
            "model_type": "qwen3_moe",
            "mlp_only_layers": [3],
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "num_hidden_layers": 5,
            "head_dim": 48,
        },
        {"model_type": "olmoe", "num_key_value_heads": 4, "attention_bias": True} | SMALL,
        {
            "model_type": "deepseek_v3",
            "q_lora_rank": None,
            "attention_bias": True,
            "n_shared_experts": 3,
            "first_k_dense_replace": 1,
        }
        | SMALL,
    ],
    ids=lambda config: f"{config['model_type']}, {len(config)} entries",
)
def test_every_parameter_as_transformers_builds_it(config):
    real = {name: tuple(p.shape) for name, p in build_on_meta(config).named_parameters()}
    assert {n: p.shape for n, p in ModelShape.from_config(config).named_parameters()} == real


@pytest.mark.parametrize(
    ("name", "count", "active"),
    [
        ("mixtral-8x7b", MIXTRAL, 12_879_925_248),
        ("qwen3-30b-a3b", QWEN_SMALL, 3_353_032_704),
        ("qwen3-235b-a22b", QWEN_LARGE, 22_190_763_520),
        ("deepseek-v3", DEEPSEEK, 37_552_282_624),
    ],
)
def test_published_counts(name, count, active):
    shape = ModelShape.from_config(read_model(name))
    assert shape.num_parameters == count
    assert shape.num_active_parameters == active


@pytest.mark.parametrize("family", KNOWN_MODEL_TYPES)
def test_what_is_absent_is_transformers_default(family):
    shape, real = ModelShape.from_config({"model_type": family}), AutoConfig.for_model(family)
    assert shape.top_k == real.num_experts_per_tok
    assert shape.is_tied == real.tie_word_embeddings
    assert shape.attention.sliding_window == getattr(real, "sliding_window", None)
    assert shape.aux_loss_coef == 0
    has_aux_loss = hasattr(real, "router_aux_loss_coef")
    turned_on = ModelShape.from_config({"model_type": family, "output_router_logits": True})
    assert turned_on.aux_loss_coef == (real.router_aux_loss_coef if has_aux_loss else 0)


def test_defaults_are_refused_without_transformers(monkeypatch):
    config_defaults.read_defaults.cache_clear()
    monkeypatch.setattr(config_defaults, "find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match=r"'olmoe' in .* transformers must be installed"):
        ModelShape.from_config({"model_type": "olmoe"})


def test_a_window_that_is_turned_off():
    window = {"model_type": "qwen3_moe", "sliding_window": 128}
    assert ModelShape.from_config(window).attention.sliding_window is None
    window["use_sliding_window"] = True
    assert ModelShape.from_config(window).attention.sliding_window == 128


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"model_type": "llama"}, ["model_type is 'llama'", *KNOWN_MODEL_TYPES]),
        ({}, ["model_type is None"]),
        ({"model_type": "mixtral", "hidden_size": "big"}, ["hidden_size is 'big'", "at least 1"]),
        ({"model_type": "mixtral", "hidden_size": True}, ["hidden_size is True"]),
        ({"model_type": "mixtral", "num_hidden_layers": 10**12}, ["is 1000000000000", "at most"]),
        ({"model_type": "mixtral", "num_local_experts": 1e30}, ["is 1e+30", "a whole number"]),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [True]}, ["is [True]", "a list"]),
        ({"model_type": "mixtral", "sliding_window": -1}, ["sliding_window is -1", "at least 1"]),
        (
            {
                "model_type": "olmoe",
                "output_router_logits": True,
                "router_aux_loss_coef": float("nan"),
            },
            ["router_aux_loss_coef is nan", "at least 0"],
        ),
        ({"model_type": "mixtral", "vocab_size": 0}, ["vocab_size is 0", "at least 1"]),
        ({"model_type": "olmoe", "num_experts_per_tok": 65}, ["is 65", "at most num_experts, 64"]),
        ({"model_type": "mixtral", "num_key_value_heads": 5}, ["is 32", "multiple of the 5"]),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 3}, ["mlp_only_layers is 3", "a list"]),
        ({"model_type": "olmoe", "tie_word_embeddings": "no"}, ["is 'no'", "True or False"]),
        (
            {"model_type": "olmoe", "output_router_logits": True, "router_aux_loss_coef": -1},
            ["router_aux_loss_coef is -1", "at least 0"],
        ),
    ],
)
def test_what_no_model_can_be_made_of(config, parts):
    with pytest.raises(ConfigurationError) as error:
        ModelShape.from_config(config)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message
    assert message.endswith(".")
