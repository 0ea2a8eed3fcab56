"""A run on a base in its published precision is one on the same weights dequantized."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.quantization_config import without_quantization
from tests.families.check import Ground, train_options, write_examples
from tests.families.run import train_family
from tests.support.quantized_models import save_quantized


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_a_run_on_a_quantized_base_equals_one_on_its_dequantized_weights(ranks2, tmp_path, name):
    published = save_quantized(name, tmp_path / "published")
    grounds = [
        Ground(folder, tmp_path / "data.json", tmp_path / f"{folder.name}-trained")
        for folder in (published, save_dequantized(published, tmp_path / "plain"))
    ]
    write_examples(grounds[0].data)
    seen, wanted = (ranks2.run(train_family, train_options(ground))[0] for ground in grounds)
    assert (seen.refusal, wanted.refusal) == ("", "")
    assert seen.step.loss == wanted.step.loss
    assert differing(seen.step.gradients, wanted.step.gradients) == []
    models = [AutoModelForCausalLM.from_pretrained(ground.output) for ground in grounds]
    assert not hasattr(models[0].config, "quantization_config")
    assert differing(*(model.state_dict() for model in models)) == []
    trained = dict(models[0].named_parameters())
    assert differing(seen.weights, {key: trained[key].detach() for key in seen.weights}) == []


def test_an_adapter_of_a_quantized_base_passes_its_check_with_plain_peft(ranks2, tmp_path):
    published = save_quantized("deepseek_v3", tmp_path / "published")
    ground = Ground(published, tmp_path / "data.json", tmp_path / "adapter")
    write_examples(ground.data)
    seen = ranks2.run(train_family, train_options(ground, use_lora="all", lora_r=4))[0]
    assert seen.refusal == ""
    assert (ground.output / "adapter_model.safetensors").exists()


def save_dequantized(published, folder):
    """Write the tensors of a quantized model in float32, and a config that says so."""
    folder.mkdir()
    index = open_checkpoint(published, dtype=torch.float32)
    tensors = {key: index.read(key) for key in index}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert not any(tensor.requires_grad for tensor in tensors.values())
    config = without_quantization(json.loads((published / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def differing(seen, wanted):
    """Return the names of tensors that are not equal bit for bit."""
    assert seen.keys() == wanted.keys()
    return [name for name in seen if not torch.equal(seen[name], wanted[name])]
