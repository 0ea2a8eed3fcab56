"""Loading equals from_pretrained bit for bit, and reads no more than it must."""

import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from megablocks_utils.checkpoint.index import CheckpointIndex, open_checkpoint
from megablocks_utils.checkpoint.layouts import detect_layout, is_expert_parameter
from megablocks_utils.checkpoint.load import (
    build_model_on_meta,
    check_against_model,
    load_dense_parameters,
    load_experts,
)
from tests.support.tiny_models import FAMILIES, edit_config, save_tiny_model

EXPERTS = "model.layers.1.mlp.experts"


class RecordingIndex(CheckpointIndex):
    """Note every read, and refuse one while the tensor of the last one is still held."""

    def __init__(self, index: CheckpointIndex):
        super().__init__(index.folder, {key: index._entry(key) for key in index})
        self.reads = []
        self._last = None

    def _note(self, what, tensor):
        assert self._last is None or self._last() is None, f"two tensors held before {what}"
        self._last = weakref.ref(tensor)
        self.reads.append((*what, tensor.nbytes))
        return tensor

    def read(self, key):
        return self._note((key,), super().read(key))

    def read_rows(self, key, start, stop):
        return self._note((key, start, stop), super().read_rows(key, start, stop))


def load_whole(folder, dtype=torch.float32):
    """Load all experts and everything else through our reader; return names to tensors."""
    index = open_checkpoint(folder)
    layout = detect_layout(index)
    model = build_model_on_meta(folder)
    check_against_model(model, index, layout)
    load_dense_parameters(model, index, layout, dtype=dtype)
    loaded = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_expert_parameter(name):
            assert parameter.is_meta
            module_name, _, tensor = name.rpartition(".")
            halves = [
                load_experts(index, layout, module_name, first=e, last=e + 2, dtype=dtype)[tensor]
                for e in (0, 2)
            ]
            loaded[name] = torch.cat(halves)
        else:
            loaded[name] = parameter.detach()
    return model, loaded


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_from_pretrained(tmp_path, family, sharded, fused, tied):
    save_tiny_model(family, tmp_path, sharded=sharded, fused=fused, tie_word_embeddings=tied)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    model, loaded = load_whole(tmp_path)
    expected = dict(reference.named_parameters(remove_duplicate=False))
    assert list(loaded) == list(expected)
    for name, tensor in expected.items():
        assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], tensor), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_casts_and_keeps_buffers_as_from_pretrained(tmp_path, family):
    save_tiny_model(family, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model, loaded = load_whole(tmp_path, torch.bfloat16)
    for name, tensor in reference.named_parameters():
        assert loaded[name].dtype == torch.bfloat16 and torch.equal(loaded[name], tensor), name
    ours, theirs = dict(model.named_buffers()), dict(reference.named_buffers())
    assert ours.keys() == theirs.keys() and "model.rotary_emb.inv_freq" in ours
    for name, buffer in theirs.items():
        assert ours[name].dtype == buffer.dtype and torch.equal(ours[name], buffer), name
    assert model.config.dtype == torch.bfloat16


def test_a_dense_layer_between_moe_layers(tmp_path):
    save_tiny_model("qwen3_moe", tmp_path, mlp_only_layers=[0])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    _, loaded = load_whole(tmp_path)
    assert "model.layers.0.mlp.gate_proj.weight" in loaded
    for name, tensor in reference.named_parameters():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_when_the_experts_are_put_in(tmp_path, family):
    save_tiny_model(family, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    model, loaded = load_whole(tmp_path)
    model.load_state_dict(loaded, assign=True)
    token_ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        expected = reference(input_ids=token_ids).logits
        assert torch.equal(model.eval()(input_ids=token_ids).logits, expected)


def test_reads_only_the_wanted_experts_per_expert(tmp_path):
    save_tiny_model("mixtral", tmp_path)
    index = RecordingIndex(open_checkpoint(tmp_path))
    load_experts(index, detect_layout(index), EXPERTS, first=1, last=3, dtype=torch.bfloat16)
    block = "model.layers.1.block_sparse_moe.experts"
    names = [(e, w) for e in (1, 2) for w in ("w1", "w3")] + [(1, "w2"), (2, "w2")]
    assert index.reads == [(f"{block}.{e}.{w}.weight", 64 * 96 * 4) for e, w in names]


def test_reads_only_the_wanted_experts_fused(tmp_path):
    save_tiny_model("mixtral", tmp_path, fused=True)
    index = RecordingIndex(open_checkpoint(tmp_path))
    load_experts(index, detect_layout(index), EXPERTS, first=1, last=3, dtype=torch.bfloat16)
    gate_up = [(f"{EXPERTS}.gate_up_proj", e, e + 1, 2 * 96 * 64 * 4) for e in (1, 2)]
    down = [(f"{EXPERTS}.down_proj", e, e + 1, 64 * 96 * 4) for e in (1, 2)]
    assert index.reads == gate_up + down


def test_dense_load_reads_each_tensor_once_and_no_expert(tmp_path):
    save_tiny_model("qwen3_moe", tmp_path)
    index = RecordingIndex(open_checkpoint(tmp_path))
    layout = detect_layout(index)
    model = build_model_on_meta(tmp_path)
    check_against_model(model, index, layout)
    assert index.reads == []
    load_dense_parameters(model, index, layout, dtype=torch.bfloat16)
    keys = [key for key, _ in index.reads]
    assert sorted(keys) == sorted(key for key in index if not layout.matches(key))


def test_tied_weight_stored_under_its_copy_only(tmp_path):
    save_tiny_model("olmoe", tmp_path, sharded=False)
    expected = open_checkpoint(tmp_path).read("lm_head.weight")
    index = open_checkpoint(tmp_path)
    kept = {key: index._entry(key) for key in index if key != "model.embed_tokens.weight"}
    edit_config(tmp_path, tie_word_embeddings=True)
    index = CheckpointIndex(tmp_path, kept)
    layout = detect_layout(index)
    model = build_model_on_meta(tmp_path)
    check_against_model(model, index, layout)
    load_dense_parameters(model, index, layout, dtype=torch.float32)
    assert torch.equal(model.model.embed_tokens.weight, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_requires_grad_stays(tmp_path):
    save_tiny_model("mixtral", tmp_path)
    index = open_checkpoint(tmp_path)
    model = build_model_on_meta(tmp_path)
    model.model.norm.weight.requires_grad_(False)
    load_dense_parameters(model, index, detect_layout(index), dtype=torch.float32)
    assert not model.model.norm.weight.requires_grad
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_model_takes_the_first_layers(tmp_path, family):
    full = save_tiny_model(family, tmp_path, num_hidden_layers=3)
    index = open_checkpoint(tmp_path)
    layout = detect_layout(index)
    model = build_model_on_meta(tmp_path, truncate_layers=2)
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    check_against_model(model, index, layout, truncate_layers=2)
    load_dense_parameters(model, index, layout, dtype=torch.float32)
    expected = dict(full.named_parameters())
    for name, parameter in model.named_parameters():
        assert is_expert_parameter(name) or torch.equal(parameter, expected[name]), name


def test_generation_config_comes_from_the_folder(tmp_path):
    save_tiny_model("mixtral", tmp_path)
    GenerationConfig(max_new_tokens=17, eos_token_id=[2, 5]).save_pretrained(tmp_path)
    model = build_model_on_meta(tmp_path)
    assert model.generation_config.max_new_tokens == 17
    assert model.generation_config.eos_token_id == [2, 5]
