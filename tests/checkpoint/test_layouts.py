"""Every kind of layout: read as transformers reads it, and written as it writes it."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from megablocks_utils.checkpoint import layouts
from megablocks_utils.checkpoint.expert_trace import Span
from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.errors import CheckpointError
from tests.support.reads import recorded_reads
from tests.support.tiny_families import CAUSAL, save_tiny

# One of each kind that the families of transformers have.
KINDS = {
    "one list of matrices each": "mixtral",
    "buffers beside": "minimax_m2",
    "no gate": "nemotron_h",
    "interleaved": "inkling_text",
    "turned": "qwen3_vl_moe",
    "gate and up apart, fused": "step3p7",
    "renamed, fused": "granitemoe",
    "as in memory, with biases": "gpt_oss",
    "experts without a second projection": "longcat_flash",
    "one list for two experts modules": "ernie4_5_vl_moe",
    "dense weights joined": "qwen4_exp_text",
}


@pytest.fixture(scope="module", params=list(KINDS.values()), ids=list(KINDS))
def stored(request, tmp_path_factory):
    """A folder and what transformers reads from it."""
    folder = tmp_path_factory.mktemp("layout")
    model_type = request.param
    save_tiny(model_type, folder)
    auto = AutoModelForCausalLM if model_type in CAUSAL else AutoModelForImageTextToText
    return folder, auto.from_pretrained(folder, dtype=torch.float32)


def read_whole(reader, model, name):
    seen = torch.full_like(model.state_dict()[name], 7)
    reader.fill_local(name, seen, (0,) * seen.dim())
    return seen


def test_every_tensor_is_what_transformers_reads(stored):
    folder, model = stored
    index = open_checkpoint(folder)
    layout = ModelLayout(model, index)
    reader = SliceReader(index, layout)
    assert not layout.missing and not layout.unused
    for name, tensor in model.state_dict().items():
        assert torch.equal(read_whole(reader, model, name), tensor), name


def test_every_tensor_is_written_as_transformers_writes_it(stored, tmp_path):
    folder, model = stored
    layout = ModelLayout(model, open_checkpoint(folder))
    model.save_pretrained(tmp_path)
    theirs = open_checkpoint(tmp_path)
    announced, ours = {}, {}
    for name in layout.shapes:
        announced |= dict(layout.hub_shapes(name))
    for name, tensor in model.state_dict().items():
        ours |= dict(layout.hub_tensors(name, tensor))
    assert set(ours) == set(theirs)
    assert announced == {key: tensor.shape for key, tensor in ours.items()}
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs.read(key)), key


def test_names_without_a_folder_are_those_of_save_pretrained(stored):
    folder, model = stored
    layout = ModelLayout.of_saved(model)
    names = {key for name in layout.shapes for key in layout.sources(name)}
    assert names == set(open_checkpoint(folder).keys())


def test_of_experts_only_the_wanted_bytes_are_read(stored):
    """Some rows of one expert, or of a turned one some columns: those bytes and no others."""
    folder, model = stored
    index = open_checkpoint(folder)
    layout = ModelLayout(model, index)
    reader = SliceReader(index, layout)
    for name, whole in model.state_dict().items():
        if not layout.is_expert(name) or whole.dim() != 3:
            continue
        is_turned = next(layout.expert_parts(name, range(1))).is_turned
        window = (slice(2, 4), slice(None), slice(0, 5)) if is_turned else (slice(2, 4),)
        local = torch.empty_like(whole[window])
        with recorded_reads() as reads:
            reader.fill_local(name, local, (2, 0, 0))
        assert torch.equal(local, whole[window]), name
        assert reads.num_bytes == local.nbytes, name


@pytest.mark.parametrize("start", [0, 3, 40])
def test_a_window_of_an_interleaved_weight(tmp_path, start):
    """Gate and up lie between each other on disk: a window of each is scattered rightly."""
    model = save_tiny("inkling_text", tmp_path)
    index = open_checkpoint(tmp_path)
    layout = ModelLayout(model, index)
    reader = SliceReader(index, layout)
    name = next(n for n in layout.shapes if n.endswith("experts.gate_up_proj"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()[name]
    local = torch.empty(2, 50, 9)
    reader.fill_local(name, local, (1, start, 7))
    assert torch.equal(local, whole[1:3, start : start + 50, 7:16])


@cache
def _bugs():
    """Ways in which a trace could be wrong, as changes of one part."""
    return {
        "turned": lambda part: replace(part, is_turned=not part.is_turned),
        "of the next expert": lambda part: replace(part, expert=part.expert ^ 1),
        "interleaved": lambda part: replace(
            part, rows=Span(part.rows.stored, range(part.rows.memory.start // 64, 128, 2))
        ),
    }


@pytest.mark.parametrize("bug", list(_bugs()))
def test_a_wrong_trace_is_seen(tmp_path, monkeypatch, bug):
    """The comparison above would notice each of them."""
    model = save_tiny("qwen3_moe", tmp_path, hidden_size=64, moe_intermediate_size=64)
    index = open_checkpoint(tmp_path)
    trace = layouts.trace_parts
    monkeypatch.setattr(
        layouts, "trace_parts", lambda *args: [_bugs()[bug](part) for part in trace(*args)]
    )
    reader = SliceReader(index, ModelLayout(model, index))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert not torch.equal(read_whole(reader, model, name), model.state_dict()[name])


@contextmanager
def edited(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    yield tensors
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_gap_between_experts_is_not_closed(tmp_path):
    """Transformers would take the ninth expert for the fourth."""
    model = save_tiny("qwen3_moe", tmp_path)
    with edited(tmp_path) as tensors:
        for key in [key for key in tensors if ".experts.3." in key]:
            tensors[key.replace(".experts.3.", ".experts.8.")] = tensors.pop(key)
    layout = ModelLayout(model, open_checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match=r"gate_up_proj cannot .*: expert 3 is not stored"):
        list(layout.expert_parts("model.layers.0.mlp.experts.gate_up_proj", range(8)))


def test_what_nobody_takes_is_named(tmp_path):
    model = save_tiny("deepseek_v3", tmp_path)
    with edited(tmp_path) as tensors:
        tensors["model.layers.9.eh_proj.weight"] = torch.ones(2)
    layout = ModelLayout(model, open_checkpoint(tmp_path))
    assert list(layout.unused) == ["model.layers.9.eh_proj.weight"]


def test_what_is_stored_twice_is_named(tmp_path):
    """In two forms, or with and without the prefix of the base model: one of them would be lost."""
    model = save_tiny("qwen3_moe", tmp_path)
    fused = "model.layers.0.mlp.experts.down_proj"
    with edited(tmp_path) as tensors:
        tensors["norm.weight"] = tensors["model.norm.weight"] + 1
        tensors[fused] = torch.zeros(model.state_dict()[fused].shape)
    layout = ModelLayout(model, open_checkpoint(tmp_path))
    assert len(layout.unused) == 1 + 8
    assert set(layout.unused.values()) == {"model.norm.weight", fused}
