"""The choice of a run's adapters: new ones, or those of an adapter that is there."""

import pytest
import torch

from megablocks_utils.config import AdapterConfig
from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.lora.apply import apply_lora, choose_adapters
from megablocks_utils.lora.settings import LoraSettings, build_peft_config
from tests.support.tiny_adapters import ATTENTION, edit_tensors, save_fused_adapter
from tests.support.tiny_models import build_tiny_model

ALL_ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")
EXPERTS = {"gate_up_proj": 4, "down_proj": 4}


@pytest.mark.parametrize(
    ("use_lora", "modules", "experts"),
    [
        ("attn-only", ALL_ATTENTION, {}),
        ("mlp-only", (), EXPERTS),
        ("all", ALL_ATTENTION, EXPERTS),
    ],
)
def test_new_adapters(use_lora, modules, experts):
    chosen = choose_adapters(build_tiny_model("olmoe"), AdapterConfig(use_lora, 4, 6))
    assert chosen.source is None
    assert chosen.settings == LoraSettings(4, 6, modules, experts)
    assert chosen.settings.scaling == 1.5


def test_parts_by_name():
    """A router of a class of its own is found by its weight, the head by its name."""
    config = AdapterConfig(lora_r=4, lora_alpha=6, lora_target=("router", "lm_head", "attention"))
    settings = choose_adapters(build_tiny_model("mixtral"), config).settings
    ends = (*ALL_ATTENTION[:1], "lm_head", *ALL_ATTENTION[1:])
    assert settings == LoraSettings(4, 6, ends, {}, router_weights=("gate",))


@pytest.mark.parametrize(
    ("target", "options", "needs"),
    [
        ("shared", {}, "shared experts or dense MLPs"),
        ("lm_head", {"tie_word_embeddings": True}, "an output head of its own"),
    ],
)
def test_parts_that_a_model_lacks(target, options, needs):
    config = AdapterConfig(lora_r=4, lora_alpha=6, lora_target=(target,))
    with pytest.raises(ConfigurationError, match=f"lora_target {target} needs .*{needs}"):
        choose_adapters(build_tiny_model("mixtral", **options), config)


def test_dropout_is_of_linear_layers_in_training_alone():
    model = build_tiny_model("mixtral")
    config = AdapterConfig(lora_r=4, lora_alpha=6, lora_target=("attention",), lora_dropout=0.5)
    chosen = choose_adapters(model, config)
    apply_lora(model, None, chosen, dtype=torch.float32, seed=0)
    layer = model.model.layers[0].self_attn.q_proj
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    tokens = torch.ones(1, 8, layer.in_features)
    assert not torch.equal(layer.train()(tokens), layer(tokens))
    assert torch.equal(layer.eval()(tokens), layer(tokens))
    assert build_peft_config(chosen.settings, model).lora_dropout == 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_fused_adapter("mixtral", folder, r=4, lora_alpha=8)
    return str(folder)


def test_an_adapter_to_go_on_from_brings_its_own_settings(folder):
    config = AdapterConfig("all", None, None, resume_adapter=folder)
    chosen = choose_adapters(build_tiny_model("mixtral"), config)
    assert chosen.settings == LoraSettings(4, 8, ATTENTION, EXPERTS)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"use_lora": "attn-only"}, "use_lora is attn-only"),
        ({"lora_target": ("attention",)}, "lora_target is attention"),
        ({"lora_target": ("router", "attention", "experts")}, "lora_target is router,attention,ex"),
        ({"lora_target": ("router", "attention")}, None),
    ],
)
def test_parts_of_an_adapter_to_go_on_from(tmp_path, given, found):
    """Some layers of the attention are enough; a word of use_lora never means routers."""
    targets = {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}
    save_fused_adapter("mixtral", tmp_path, **targets)
    config = AdapterConfig(**given, resume_adapter=str(tmp_path))
    model = build_tiny_model("mixtral")
    if found is None:
        settings = choose_adapters(model, config).settings
        assert (settings.target_modules, settings.router_weights) == (("q_proj",), ("gate",))
        return
    with pytest.raises(ConfigurationError, match=f"{found}.* is on lora_target attention,router"):
        choose_adapters(model, config)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"lora_r": 16}, "--lora_r is 16, but the adapter {} has 4."),
        ({"lora_alpha": 4}, "--lora_alpha is 4, but the adapter {} has 8."),
        ({"use_lora": "mlp-only"}, "--use_lora is mlp-only, but the adapter {} has all."),
    ],
)
def test_options_that_contradict_the_adapter(folder, given, sentence):
    options = {"use_lora": "all", "lora_r": None, "lora_alpha": None} | given
    with pytest.raises(ConfigurationError) as refusal:
        choose_adapters(
            build_tiny_model("mixtral"), AdapterConfig(**options, resume_adapter=folder)
        )
    assert refusal.value.as_options() == sentence.format(folder)


def test_new_adapters_need_a_rank_and_a_strength():
    with pytest.raises(ConfigurationError, match=r"^new adapters need lora_r and lora_alpha"):
        choose_adapters(build_tiny_model("mixtral"), AdapterConfig("all", None, None))


def test_adapters_on_experts_need_split_experts():
    model = build_tiny_model("mixtral")
    chosen = choose_adapters(model, AdapterConfig("mlp-only", 4, 8))
    with pytest.raises(ConfigurationError, match=r"^sharded is None, but adapters on experts"):
        apply_lora(model, None, chosen, dtype=torch.float32, seed=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_that_is_not_finite_is_refused(tmp_path):
    save_fused_adapter("mixtral", tmp_path, target_parameters=None)

    def spoil(tensors):
        tensors[sorted(tensors)[0]][0, 0] = float("nan")

    edit_tensors(tmp_path, spoil)
    model = build_tiny_model("mixtral")
    config = AdapterConfig("attn-only", None, None, resume_adapter=str(tmp_path))
    chosen = choose_adapters(model, config)
    with pytest.raises(CheckpointError, match="k_proj.lora_A.weight .* holds 1 non-finite value"):
        apply_lora(model, None, chosen, dtype=torch.float32, seed=0)


def test_the_settings_in_pefts_words():
    settings = LoraSettings(4, 6, ("q_proj",), {"gate_up_proj": 8, "down_proj": 4})
    config = build_peft_config(settings, build_tiny_model("mixtral"))
    assert config.target_modules == {"q_proj"}
    assert config.target_parameters == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 6, 0.0)
    assert config.rank_pattern == {"mlp.experts.gate_up_proj": 8}
    assert config.alpha_pattern == {"mlp.experts.gate_up_proj": 12.0}
