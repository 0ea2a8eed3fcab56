"""Names and order of the tensors are those of a real PEFT model."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from megablocks_utils.lora.peft_format import (
    ExpertPlace,
    linear_key,
    pack_lora_a,
    pack_lora_b,
    unpack_lora_a,
    unpack_lora_b,
)
from megablocks_utils.lora.settings import LoraSettings, build_peft_config
from tests.support.tiny_adapters import (
    PEFT_WARNINGS,
    WEIGHTS,
    attach_random_adapters,
    edit_tensors,
    expert_deltas,
    save_fused_adapter,
)
from tests.support.tiny_models import FAMILIES, build_tiny_model

pytestmark = PEFT_WARNINGS
SCALING = 2.0
PROJECTIONS = {"gate_up_proj": (192, 64), "down_proj": (64, 96)}


def expert_key(name, side):
    """As PEFT wraps both projections of the experts: gate_up inside, down outside."""
    module, _, projection = name.rpartition(".")
    inner = ".base_layer" if projection == "gate_up_proj" else ""
    return linear_key(f"{module}{inner}", side)


def expert_names():
    return [
        f"model.layers.{n}.mlp.experts.{projection}" for n in (0, 1) for projection in PROJECTIONS
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_unpacked_adapters_give_what_peft_adds(tmp_path, family):
    deltas = expert_deltas(save_fused_adapter(family, tmp_path))
    tensors = load_file(tmp_path / WEIGHTS)
    assert set(deltas) == set(expert_names())
    for name, delta in deltas.items():
        lora_a = unpack_lora_a(tensors[expert_key(name, "A")], 4)
        lora_b = unpack_lora_b(tensors[expert_key(name, "B")], 4)
        assert torch.equal(SCALING * (lora_b @ lora_a), delta), name


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_adds_what_was_packed(tmp_path, family):
    save_fused_adapter(family, tmp_path)
    generator = torch.Generator().manual_seed(3)
    wanted = {}

    def replace(tensors):
        for name in expert_names():
            num_rows, num_columns = PROJECTIONS[name.rpartition(".")[2]]
            lora_a = torch.randn(4, 4, num_columns, generator=generator)
            lora_b = torch.randn(4, num_rows, 4, generator=generator)
            wanted[name] = SCALING * (lora_b @ lora_a)
            for side, packed in (("A", pack_lora_a(lora_a)), ("B", pack_lora_b(lora_b))):
                assert tensors[expert_key(name, side)].shape == packed.shape
                tensors[expert_key(name, side)] = packed.contiguous()

    edit_tensors(tmp_path, replace)
    deltas = expert_deltas(PeftModel.from_pretrained(build_tiny_model(family), tmp_path))
    for name, delta in deltas.items():
        assert torch.equal(wanted[name], delta), name


@pytest.mark.parametrize("is_turned", [False, True])
def test_what_is_packed_is_read_again(is_turned):
    """Also with rows for experts that compute nothing, which get zeros."""
    place = ExpertPlace((3, 7, 5), 4, is_transposed=True, is_turned=is_turned)
    factors = {"A": torch.randn(3, 2, 5), "B": torch.randn(3, 7, 2)}
    packed = dict(place.pack(side, factor) for side, factor in factors.items())
    assert {s: tuple(x.shape) for s, x in packed.items()} == {
        side: place.packed_shape(side, 2) for side in "AB"
    }
    lora_a, lora_b = place.own_sides(unpack_lora_a(packed["A"], 4), unpack_lora_b(packed["B"], 4))
    assert torch.equal(lora_a[:3], factors["A"]) and torch.equal(lora_b[:3], factors["B"])
    assert not lora_a[3].any() and not lora_b[3].any()


def test_unpacking_undoes_packing():
    lora_a, lora_b = torch.randn(3, 2, 5), torch.randn(3, 7, 2)
    assert torch.equal(unpack_lora_a(pack_lora_a(lora_a), 3), lora_a)
    assert torch.equal(unpack_lora_b(pack_lora_b(lora_b), 3), lora_b)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_keys_are_all_that_peft_writes(tmp_path, family):
    save_fused_adapter(family, tmp_path)
    linears = [
        f"model.layers.{n}.self_attn.{target}" for n in (0, 1) for target in ("k_proj", "q_proj")
    ]
    keys = {linear_key(name, side) for name in linears for side in "AB"}
    keys |= {expert_key(name, side) for name in expert_names() for side in "AB"}
    assert keys == set(load_file(tmp_path / WEIGHTS))


@pytest.mark.parametrize(
    "settings",
    [
        LoraSettings(4, 8, ("q_proj",), dict.fromkeys(PROJECTIONS, 4)),
        LoraSettings(4, 8, (), dict.fromkeys(PROJECTIONS, 4)),
        LoraSettings(3, 1, ("o_proj", "q_proj"), {"gate_up_proj": 6, "down_proj": 3}),
    ],
    ids=["all", "experts_only", "twice_the_rank"],
)
def test_settings_mean_the_same_to_peft(settings):
    model = build_tiny_model("mixtral")
    peft_model = attach_random_adapters(model, build_peft_config(settings, model))
    seen = {}
    for name, module in peft_model.named_modules():
        if hasattr(module, "lora_A"):
            target = getattr(module, "parameter_name", name.rpartition(".")[2])
            assert module.scaling["default"] == pytest.approx(settings.scaling, rel=1e-12)
            seen.setdefault(target, set()).add(module.r["default"])
    wanted = dict.fromkeys(settings.target_modules, settings.r) | dict(settings.expert_ranks)
    assert seen == {target: {rank} for target, rank in wanted.items()}


def test_settings_without_experts():
    assert LoraSettings(4, 8, ("q_proj",)).expert_ranks == {}
    settings = LoraSettings(4, 8, ("q_proj",))
    config = build_peft_config(settings, build_tiny_model("mixtral"), "base")
    assert (config.target_modules, config.target_parameters) == ({"q_proj"}, None)
    assert config.base_model_name_or_path == "base"
