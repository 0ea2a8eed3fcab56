"""What config.json says and what is stored: nothing stored is lost without a word."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.load import build_model_on_meta
from megablocks_utils.checkpoint.model_check import check_against_model
from megablocks_utils.errors import CheckpointError
from tests.support.tiny_models import FAMILIES, edit_config, save_tiny_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SWITCHED = {"attention_bias": True}


def check(folder):
    index = open_checkpoint(folder)
    model = build_model_on_meta(folder)
    return check_against_model(model, index, ModelLayout(model, index))


def refusal(action, folder):
    with pytest.raises(CheckpointError) as error:
        action(folder)
    return str(error.value)


def edit_tensors(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_its_own_is_not_dropped_by_tying(tmp_path, family):
    save_tiny_model(family, tmp_path, sharded=False)
    edit_config(tmp_path, tie_word_embeddings=True)
    assert refusal(check, tmp_path) == (
        f"{tmp_path} stores {HEAD} with other values than {EMBEDDING}, but its config.json has"
        " tie_word_embeddings true, which would drop it: set that to false, or remove the tensor"
    )


@pytest.mark.parametrize("row", [0, 77, 127])
def test_one_row_that_differs_is_enough(tmp_path, row):
    save_tiny_model("mixtral", tmp_path, sharded=False)
    edit_config(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert check(tmp_path) == []
    edit_tensors(tmp_path, lambda tensors: tensors[HEAD][row, 5:6].add_(1e-3))
    assert "stores lm_head.weight with other values" in refusal(check, tmp_path)


def test_a_head_that_is_missing_is_no_head_that_is_tied(tmp_path):
    save_tiny_model("qwen3_moe", tmp_path, sharded=False, tie_word_embeddings=True)
    assert check(tmp_path) == []
    edit_config(tmp_path, tie_word_embeddings=False)
    assert refusal(check, tmp_path) == (
        f"{tmp_path} does not fit its config.json: 1 tensor missing ({HEAD}); tie_word_embeddings"
        " is False"
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
@pytest.mark.parametrize("says", [True, False])
def test_biases_that_the_config_denies_or_promises(tmp_path, family, says):
    save_tiny_model(family, tmp_path, sharded=False, attention_bias=not says)
    edit_config(tmp_path, attention_bias=says)
    message = refusal(check, tmp_path)
    kind = "missing" if says else "unexpected"
    assert f"tensors {kind} (model.layers.0.self_attn." in message
    assert message.endswith(f"; attention_bias is {says}")


@pytest.mark.parametrize(("name", "value"), [("num_experts", 3), ("num_hidden_layers", 1)])
@pytest.mark.parametrize("fused", [False, True])
def test_fewer_than_are_stored(tmp_path, name, value, fused):
    save_tiny_model("olmoe", tmp_path, sharded=False, fused=fused)
    edit_config(tmp_path, **{name: value})
    stored = {"num_experts": 4, "num_hidden_layers": 2}[name]
    assert refusal(check, tmp_path).endswith(f"; {name} is {value}, stored are {stored}")


def test_what_transformers_ignores_is_named_and_nothing_else(tmp_path, monkeypatch):
    save_tiny_model("mixtral", tmp_path, sharded=False)
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tmp_path, lambda tensors: tensors.update({rotary: torch.zeros(8)}))
    assert check(tmp_path) == [rotary]
    edit_tensors(tmp_path, lambda tensors: tensors.update({"mtp.norm": torch.zeros(8)}))
    assert "1 tensor unexpected (mtp.norm)" in refusal(check, tmp_path)
    name = "transformers.MixtralForCausalLM._keys_to_ignore_on_load_unexpected"
    monkeypatch.setattr(name, [r"^mtp\."])
    assert check(tmp_path) == [rotary, "mtp.norm"]


def test_weights_of_whole_numbers(tmp_path):
    save_tiny_model("mixtral", tmp_path, sharded=False)
    edit_tensors(tmp_path, lambda tensors: tensors.update({HEAD: tensors[HEAD].view(torch.int32)}))
    assert refusal(check, tmp_path) == (
        f"{tmp_path} does not fit its config.json: 1 tensor of other numbers ({HEAD} is int32)"
    )


def test_a_quantized_model_that_is_not_read_is_named_before_its_tensors(tmp_path):
    save_tiny_model("mixtral", tmp_path, sharded=False)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    path = tmp_path / "config.json"
    assert refusal(build_model_on_meta, tmp_path).startswith(
        f"{path} has quantization_config (quant_method 'gptq'): quantized weights are not read"
    )


@pytest.mark.parametrize("name", ["compression_config", "quantization"])
def test_other_ways_to_say_that_it_is_quantized(tmp_path, name):
    save_tiny_model("mixtral", tmp_path, sharded=False)
    edit_config(tmp_path, **{name: {"bits": 4}})
    assert f"has {name}: quantized weights" in refusal(build_model_on_meta, tmp_path)
    edit_config(tmp_path, **{name: None}, quantization_config={})
    build_model_on_meta(tmp_path)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    assert f"{tmp_path} has quantize_config.json" in refusal(build_model_on_meta, tmp_path)
