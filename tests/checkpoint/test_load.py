"""Loading equals from_pretrained bit for bit, and reads no more than it must."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from megablocks_utils.checkpoint.index import CheckpointIndex, open_checkpoint
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.load import build_model_on_meta
from megablocks_utils.checkpoint.model_check import check_against_model
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.fsdp.materialize import materialize
from tests.support.reads import model_to_dtype, recorded_reads
from tests.support.tiny_models import FAMILIES, edit_config, save_tiny_model

CPU = torch.device("cpu")
EXPERTS = "model.layers.1.mlp.experts"


def fill(model, index):
    """Give a model on meta its weights."""
    materialize(model, SliceReader(index, ModelLayout(model, index)).fill_local, CPU)


def load_whole(folder, dtype=torch.float32, *, truncate_layers=None):
    """Build and fill a model as a run does that splits nothing."""
    index = open_checkpoint(folder)
    model = build_model_on_meta(folder, truncate_layers=truncate_layers)
    layout = ModelLayout(model, index)
    check_against_model(model, index, layout, truncate_layers=truncate_layers)
    model.tie_weights()
    model_to_dtype(model, dtype)
    fill(model, index)
    return model


def read_experts(folder, index):
    """Read experts 1 and 2 of the second layer."""
    layout = ModelLayout(build_model_on_meta(folder), index)
    names = (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj")
    reader = SliceReader(index, layout)
    for name in names:
        local = torch.empty(2, *layout.shapes[name][1:], dtype=torch.bfloat16)
        reader.fill_local(name, local, (1, 0, 0))


def parameters_of(model):
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_from_pretrained(tmp_path, family, sharded, fused, tied):
    save_tiny_model(family, tmp_path, sharded=sharded, fused=fused, tie_word_embeddings=tied)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = load_whole(tmp_path)
    loaded, expected = parameters_of(model), parameters_of(reference)
    assert list(loaded) == list(expected)
    for name, tensor in expected.items():
        assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], tensor), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_casts_and_keeps_buffers_as_from_pretrained(tmp_path, family):
    save_tiny_model(family, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = load_whole(tmp_path, torch.bfloat16)
    loaded = parameters_of(model)
    for name, tensor in reference.named_parameters():
        assert loaded[name].dtype == torch.bfloat16 and torch.equal(loaded[name], tensor), name
    ours, theirs = dict(model.named_buffers()), dict(reference.named_buffers())
    assert ours.keys() == theirs.keys() and "model.rotary_emb.inv_freq" in ours
    for name, buffer in theirs.items():
        assert ours[name].dtype == buffer.dtype and torch.equal(ours[name], buffer), name


def test_a_dense_layer_between_moe_layers(tmp_path):
    save_tiny_model("qwen3_moe", tmp_path, mlp_only_layers=[0])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = parameters_of(load_whole(tmp_path))
    assert "model.layers.0.mlp.gate_proj.weight" in loaded
    for name, tensor in reference.named_parameters():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_once_filled(tmp_path, family):
    save_tiny_model(family, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = load_whole(tmp_path)
    token_ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        expected = reference(input_ids=token_ids).logits
        assert torch.equal(model.eval()(input_ids=token_ids).logits, expected)


def test_reads_only_the_wanted_experts_per_expert(tmp_path):
    save_tiny_model("mixtral", tmp_path)
    index = open_checkpoint(tmp_path)
    with recorded_reads() as reads:
        read_experts(tmp_path, index)
    block = "model.layers.1.block_sparse_moe.experts"
    names = [(e, w) for e in (1, 2) for w in ("w1", "w3")] + [(1, "w2"), (2, "w2")]
    assert reads.by_key(index) == [(f"{block}.{e}.{w}.weight", 0, 64 * 96 * 4) for e, w in names]


def test_reads_only_the_wanted_experts_fused(tmp_path):
    save_tiny_model("mixtral", tmp_path, fused=True)
    index = open_checkpoint(tmp_path)
    with recorded_reads() as reads:
        read_experts(tmp_path, index)
    gate_up, down = 2 * 96 * 64 * 4, 64 * 96 * 4
    wanted = [(f"{EXPERTS}.gate_up_proj", e * gate_up, gate_up) for e in (1, 2)]
    wanted += [(f"{EXPERTS}.down_proj", e * down, down) for e in (1, 2)]
    assert reads.by_key(index) == wanted


@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
def test_a_whole_load_reads_every_byte_once_and_a_check_none(tmp_path, fused):
    save_tiny_model("qwen3_moe", tmp_path, fused=fused)
    index = open_checkpoint(tmp_path)
    model = build_model_on_meta(tmp_path)
    with recorded_reads() as reads:
        check_against_model(model, index, ModelLayout(model, index))
        assert reads.spans == []
        fill(model, index)
    assert len(set(reads.spans)) == len(reads.spans)
    assert reads.num_bytes == index.total_bytes
    assert {key for key, _, _ in reads.by_key(index)} == set(index)


def test_tied_weight_stored_under_its_copy_only(tmp_path):
    save_tiny_model("olmoe", tmp_path, sharded=False)
    expected = open_checkpoint(tmp_path).read("lm_head.weight")
    index = open_checkpoint(tmp_path)
    kept = {key: index._entry(key) for key in index if key != "model.embed_tokens.weight"}
    edit_config(tmp_path, tie_word_embeddings=True)
    index = CheckpointIndex(tmp_path, kept)
    model = build_model_on_meta(tmp_path)
    check_against_model(model, index, ModelLayout(model, index))
    model.tie_weights()
    fill(model, index)
    assert torch.equal(model.model.embed_tokens.weight, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_has_values_and_what_is_frozen_stays(tmp_path):
    save_tiny_model("mixtral", tmp_path)
    model = build_model_on_meta(tmp_path)
    model.model.norm.weight.requires_grad_(False)
    adapter = torch.nn.Parameter(torch.ones(3))
    model.adapter = adapter
    fill(model, open_checkpoint(tmp_path))
    assert not model.model.norm.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    assert model.adapter is adapter and torch.equal(adapter, torch.ones(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_model_takes_the_first_layers(tmp_path, family):
    full = save_tiny_model(family, tmp_path, num_hidden_layers=3)
    model = load_whole(tmp_path, truncate_layers=2)
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    expected = dict(full.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_generation_config_comes_from_the_folder(tmp_path):
    save_tiny_model("mixtral", tmp_path)
    GenerationConfig(max_new_tokens=17, eos_token_id=[2, 5]).save_pretrained(tmp_path)
    model = build_model_on_meta(tmp_path)
    assert model.generation_config.max_new_tokens == 17
    assert model.generation_config.eos_token_id == [2, 5]
