"""Adapters of every kind of experts: read, written and merged as plain PEFT does it."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.load import build_model_on_meta
from megablocks_utils.config import AdapterConfig
from megablocks_utils.lora.adapter_files import PeftNames
from megablocks_utils.lora.adapter_reader import open_adapter
from megablocks_utils.lora.apply import apply_lora, choose_adapters
from megablocks_utils.lora.settings import build_peft_config
from megablocks_utils.lora.trainable import settings_of_adapter
from megablocks_utils.merge import MergeOptions, merge_adapter
from megablocks_utils.shard_moe_utils import shard_moe
from tests.support.tiny_adapters import (
    PEFT_WARNINGS,
    WEIGHTS,
    attach_random_adapters,
    expert_deltas,
)
from tests.support.tiny_families import build_tiny

pytestmark = PEFT_WARNINGS
# One of each form: transposed, with biases, interleaved; without a gate, in `mixer`; on the layer
# itself; latent attention, and dense layers that PEFT takes for experts; stored (in, out) without
# saying so; more rows than experts; in a folder that also sees.
FAMILIES = (
    *("gpt_oss", "nemotron_h", "gemma4_text", "deepseek_v3"),
    *("llama4_text", "longcat_flash", "qwen3_5_moe"),
)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, tmp_path_factory):
    """A base in bfloat16 and PEFT's random adapter on all that has one: folder, settings, model."""
    folder = tmp_path_factory.mktemp(request.param)
    build_tiny(request.param).to(torch.bfloat16).save_pretrained(folder / "base")
    model = load(folder / "base")
    settings = choose_adapters(model, AdapterConfig("all", 4, 8)).settings
    peft_config = build_peft_config(settings, model, str(folder / "base"))
    peft_model = get_peft_model(model, peft_config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    peft_model.save_pretrained(folder / "adapter")
    return folder, settings, peft_model


def test_reads_what_peft_adds_and_writes_what_peft_reads(written):
    folder, settings, peft_model = written
    model = build_model_on_meta(folder / "base")
    reader = open_adapter(folder / "adapter", model)
    assert settings_of_adapter(reader, model) == settings
    tensors, names = load_file(folder / "adapter" / WEIGHTS), PeftNames(settings, model)
    deltas = expert_deltas(peft_model)
    # Dense layers that PEFT finds by their weight are read as linear layers.
    deltas = {name: delta for name, delta in deltas.items() if not name.endswith(".weight")}
    assert set(deltas) == set(reader.expert_parameters)
    for name, adapter in reader.expert_parameters.items():
        factors = reader.experts(name, range(adapter.num_stored))
        lora_a, lora_b = (factor.float() for factor in factors)
        delta = adapter.scaling * (lora_b @ lora_a)
        delta = delta.mT if adapter.is_transposed else delta
        torch.testing.assert_close(delta.to(torch.bfloat16), deltas[name], rtol=0.02, atol=1e-4)
        for side, factor in zip("AB", factors, strict=True):
            key, packed = names.to_peft(f"{name}_lora.lora_{side}", factor)
            assert torch.equal(packed, tensors[key]), key


def test_merges_as_peft_does(written, tmp_path):
    folder, _, _ = written
    out = tmp_path / "out"
    merge_adapter(MergeOptions(str(folder / "adapter"), out))
    merged = PeftModel.from_pretrained(load(folder / "base"), folder / "adapter").merge_and_unload()
    wanted, seen = merged.state_dict(), load(out).state_dict()
    assert set(seen) == set(wanted)
    assert not [name for name in wanted if not torch.equal(seen[name], wanted[name])]
    base, written_index = open_checkpoint(folder / "base"), open_checkpoint(out)
    assert set(base) == set(written_index)
    for key in base:
        if ".visual." in key:
            assert torch.equal(base.read(key), written_index.read(key)), key
    assert (out / "config.json").is_file()


def _tokens():
    return torch.randint(3, 120, (1, 12), generator=torch.Generator().manual_seed(2))


def _gradients(rank, family, folder):
    """Return the gradients of the adapters of split experts as PEFT would hold them, and logits."""
    model = build_tiny(family)
    adapters = choose_adapters(model, AdapterConfig("all", None, None, resume_adapter=str(folder)))
    names = PeftNames(adapters.settings, build_tiny(family))
    sharded = shard_moe(model, 2, kernel="eager")
    apply_lora(model, sharded, adapters, dtype=torch.float32, seed=0)
    output = model(input_ids=_tokens(), labels=_tokens(), use_cache=False)
    output.loss.backward()
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_split = isinstance(parameter, DTensor)
            # Both ranks have sent the same tokens to every expert.
            grad = parameter.grad.full_tensor() / 2 if is_split else parameter.grad
            key, packed = names.to_peft(name, grad)
            grads[key] = packed
    return output.logits.detach(), grads


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "llama4_text"])
def test_split_experts_learn_as_pefts(ranks2, family, tmp_path):
    model = build_tiny(family)
    settings = choose_adapters(model, AdapterConfig("all", 4, 8)).settings
    peft_model = attach_random_adapters(model, build_peft_config(settings, model))
    peft_model.save_pretrained(tmp_path)
    output = peft_model(input_ids=_tokens(), labels=_tokens(), use_cache=False)
    output.loss.backward()
    wanted = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in peft_model.named_parameters()
        if "lora_" in name
    }
    for logits, grads in ranks2.run(_gradients, family, tmp_path):
        assert set(grads) == set(wanted)
        assert (logits - output.logits).norm() <= 1e-5 * output.logits.norm()
        for key, grad in grads.items():
            assert (grad - wanted[key]).norm() <= 1e-5 * wanted[key].norm(), key
