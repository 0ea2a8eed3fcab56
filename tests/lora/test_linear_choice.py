"""Linear layers get adapters by what they do: token mixers, dense MLPs, never routers."""

import pytest
import torch

from megablocks_utils.config import AdapterConfig
from megablocks_utils.lora.adapter_files import PeftNames
from megablocks_utils.lora.apply import choose_adapters
from megablocks_utils.lora.linear_adapters import attach_linear_lora
from megablocks_utils.lora.linear_choice import find_dense_linears, find_mixer_linears
from megablocks_utils.lora.peft_targets import attach_on_meta
from megablocks_utils.lora.settings import LoraSettings, build_peft_config
from tests.support.tiny_families import build_tiny

# What each has that a list of names would miss: latent attention, Mamba and a router between
# layers of the same names, gated attention whose `gate_proj` is not an expert's, routers made of
# linear layers, layers without gradients or read past their forward.
MIXERS = {
    "deepseek_v32": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
    "nemotron_h": {"in_proj", "q_proj", "k_proj", "v_proj", "o_proj"},
    "afmoe": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"},
    "jamba": {"in_proj", "x_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"},
    "zaya": {"q_proj", "k_proj", "v_proj_current", "v_proj_delayed", "o_proj"},
    "lfm2_moe": {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj"},
}
DENSE = {
    "deepseek_v32": {"mlp", "mlp.shared_experts"},
    "nemotron_h": {"mixer.shared_experts"},
    "afmoe": {"mlp", "mlp.shared_experts"},
    "jamba": {"feed_forward"},
    "zaya": set(),
    "lfm2_moe": {"feed_forward"},
}


def build_on_meta(family):
    with torch.device("meta"):
        return build_tiny(family)


def linears_of(model, settings):
    """Return where adapters are once attached: path in the layer and last name."""
    attach_linear_lora(model, settings, dtype=torch.float32, seed=0)
    names = {
        name.partition(".lora_A.")[0] for name, p in model.named_parameters() if ".lora_A." in name
    }
    return {tuple(name.split(".", 3)[3].rsplit(".", 1)) for name in names}


@pytest.mark.parametrize("family", MIXERS)
def test_linear_layers_of_token_mixers_and_mlps(family):
    attention = choose_adapters(build_on_meta(family), AdapterConfig("attn-only", 2, 2)).settings
    assert not attention.expert_ranks
    mixers = linears_of(build_on_meta(family), attention)
    assert {last for _, last in mixers} == MIXERS[family]
    everything = choose_adapters(build_on_meta(family), AdapterConfig("all", 2, 2)).settings
    others = linears_of(build_on_meta(family), everything) - mixers
    assert {path for path, _ in others} == DENSE[family]


@pytest.mark.parametrize("family", ["afmoe", "deepseek_v32", "nemotron_h", "glm4v_moe"])
def test_plain_peft_attaches_the_same(family):
    """PEFT takes `gate_proj` of some families for an expert's: it finds ours by their weight."""
    model = build_on_meta(family)
    settings = choose_adapters(model, AdapterConfig("all", 2, 2)).settings
    targets = attach_on_meta(build_peft_config(settings, model), model)
    attach_linear_lora(model, settings, dtype=torch.float32, seed=0)
    ours = {n.partition(".lora_A.")[0] for n, _ in model.named_parameters() if ".lora_A." in n}
    assert {key.key for key in targets.values() if ".experts" not in key.key} == {
        name for name in ours if ".experts" not in name
    }
    shared = {name for name in ours if ".shared_experts." in name}
    assert {target.key for target in targets.values()} >= shared and shared


def test_what_selects_or_only_scales_gets_no_adapters():
    """Indexers whose results are masks, and MLPs whose sigmoid scales what a norm returns."""
    mixers = find_mixer_linears(build_on_meta("qwen4_exp_text"))
    assert mixers and not any(".indexer." in name for name in mixers)
    dense = find_dense_linears(build_on_meta("axk2"))
    assert dense and not any("norm." in name for name in dense)


def test_vision_gets_no_adapters():
    """Its attention has layers of the same names."""
    model = build_on_meta("llama4")
    settings = choose_adapters(model, AdapterConfig("attn-only", 2, 2)).settings
    names = _names(model, settings)
    assert names and all(name.startswith("language_model.model.layers.") for name in names)


def test_what_peft_would_lose_when_it_loads_is_left_out():
    """It renames `shared_experts` of this family to a name that there is not."""
    model = build_on_meta("laguna")
    settings = choose_adapters(model, AdapterConfig("all", 2, 2)).settings
    assert not any("shared_experts" in name for name in _names(model, settings))


def _names(model, settings: LoraSettings):
    attach_linear_lora(model, settings, dtype=torch.float32, seed=0)
    return [name for name, _ in model.named_parameters() if ".lora_A." in name]


def test_the_start_says_which_modules(capsys):
    settings = choose_adapters(
        build_on_meta("nemotron_h"), AdapterConfig("mlp-only", 2, 4)
    ).settings
    assert settings.describe() == "LoRA of rank 2, alpha 4, on experts.up_proj, experts.down_proj"
    assert (
        PeftNames(settings, build_on_meta("nemotron_h"))
        .to_peft("model.layers.1.mixer.experts.up_proj_lora.lora_A", torch.zeros(8, 2, 32))[0]
        .endswith("mixer.experts.base_layer.lora_A.weight")
    )
