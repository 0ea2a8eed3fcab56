"""Attention LoRA: the right modules, the right dtypes, the same start on every rank."""

import pytest
import torch

from megablocks_utils.lora.linear_adapters import attach_linear_lora
from megablocks_utils.lora.settings import LoraSettings
from tests.support.tiny_models import FAMILIES, build_tiny_model

PROJECTIONS = ("k_proj", "o_proj", "q_proj", "v_proj")
SETTINGS = LoraSettings(4, 8, PROJECTIONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_attention_projections_get_adapters(family):
    model = build_tiny_model(family)
    attach_linear_lora(model, SETTINGS, dtype=torch.float32, seed=1)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"model.layers.{layer}.self_attn.{projection}_proj.lora_{side}.default.weight"
        for layer in (0, 1)
        for projection in "kqvo"
        for side in "AB"
    }


def test_adapters_have_their_own_dtype_and_the_base_keeps_its():
    model = build_tiny_model("mixtral").to(torch.bfloat16)
    attach_linear_lora(model, SETTINGS, dtype=torch.float32, seed=1)
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if "lora_" in name else torch.bfloat16
        assert parameter.dtype == wanted, name


def _adapters(seed):
    torch.rand(7)  # whatever was drawn before must not matter
    model = build_tiny_model("mixtral")
    attach_linear_lora(model, SETTINGS, dtype=torch.float32, seed=seed)
    return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}


def test_adapters_start_from_the_seed_alone():
    """FSDP cuts its shards from each rank's own copy, so all copies must be equal."""
    first, second, other = _adapters(1), _adapters(1), _adapters(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    differing = [name for name in first if not torch.equal(first[name], other[name])]
    assert differing == [name for name in first if "lora_A" in name]
    assert not any(tensor.any() for name, tensor in first.items() if "lora_B" in name)
