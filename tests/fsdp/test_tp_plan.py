"""What of a model tensor parallelism splits, and what it says of the rest."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.fsdp.tp_plan import choose_tp_plan, find_other_style
from tests.support.tiny_families import tiny_config


def _choose(family, tp_size=2, **overrides):
    return choose_tp_plan(_build(family, **overrides), tp_size)


def _build(family, **overrides):
    config = copy.deepcopy(tiny_config(family))
    for name, value in overrides.items():
        setattr(config, name, value)
    is_text = type(config) in AutoModelForCausalLM._model_mapping
    auto = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mixtral", ""),
        ("qwen3_moe", ""),
        ("olmoe", "how tensor parallelism splits model.layers.0.self_attn.q_proj"),
        ("deepseek_v3", "how tensor parallelism splits model.layers.0.self_attn."),
    ],
)
def test_plans_are_told_what_is_split_otherwise(family, reason):
    found = find_other_style(_build(family))
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_plan_is_transformers_own_without_experts():
    plan = _choose("qwen3_moe")
    layer = "model.layers.0"
    assert plan.styles[f"{layer}.self_attn.k_proj.weight"] == "colwise"
    assert plan.styles[f"{layer}.self_attn.q_norm"] == "replicated_with_grad_allreduce"
    assert plan.styles["lm_head.weight"] == "colwise_gather_output"
    assert not any("experts" in name for name in plan.styles)
    assert plan.left_whole == {}


def test_attention_of_the_common_form_needs_no_plan():
    styles = _choose("gpt_oss").styles
    attention = "model.layers.0.self_attn"
    assert styles[f"{attention}.o_proj.bias"] == "rowwise"
    assert styles[f"{attention}.sinks"] == "colwise"
    assert styles[attention] == "local_params"


def test_a_gated_mlp_of_the_common_form_needs_no_plan():
    styles = _choose("qwen2_moe").styles
    shared = "model.layers.0.mlp.shared_expert"
    found = {name: styles[f"{shared}.{name}"] for name in ("gate_proj", "up_proj", "down_proj")}
    assert found == {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    assert f"{shared}_gate" not in styles


def test_norms_of_heads_that_the_plan_forgets_get_whole_gradients():
    styles = _choose("glm4_moe", use_qk_norm=True).styles
    for norm in ("q_norm", "k_norm"):
        assert styles[f"model.layers.0.self_attn.{norm}"] == "replicated_with_grad_allreduce"


def test_what_cannot_be_split_is_left_whole_and_named():
    tied = _choose("mixtral", tie_word_embeddings=True)
    assert set(tied.left_whole) == {"model.embed_tokens", "lm_head"}
    assert "share their weights" in tied.left_whole["lm_head"]
    assert not any(name.startswith("lm_head") for name in tied.styles)
    attention = _choose("deepseek_v2").left_whole["model.layers.*.self_attn"]
    assert attention.endswith("kv_a_proj_with_mqa is of style mla_kv_a_proj")
    latent = _choose("deepseek_v3").left_whole["model.layers.*.self_attn"]
    assert latent == "transformers' plan does not name it"
    # Rows of linear attention's output, whose heads nothing splits.
    linear = _choose("glm5_next")
    assert not any(".self_attn" in name for name in linear.styles)
    assert any("no layer beside it colwise" in reason for reason in linear.left_whole.values())


@pytest.mark.parametrize(
    ("family", "tp_size", "sentence"),
    [
        ("mixtral", 4, r"tp_size is 4, but it must divide the heads .*; 1 and 2 would work\."),
        ("zaya", 2, "tp_size is 2, but it must be 1 for model type zaya: transformers has no"),
    ],
)
def test_refusals(family, tp_size, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        _choose(family, tp_size)
