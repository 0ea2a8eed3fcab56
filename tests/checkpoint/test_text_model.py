"""A folder that also sees is trained on text, and saved as what it was."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.load import build_model_on_meta, fill_buffers
from megablocks_utils.checkpoint.model_check import check_against_model
from megablocks_utils.checkpoint.model_folder import WrittenModel, export_model
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.errors import CheckpointError
from megablocks_utils.fsdp.materialize import materialize
from tests.support.tiny_families import save_tiny

# A text class of its own; the whole's class; a text class that does not say what it ignores.
FAMILIES = ("qwen3_5_moe", "gemma4", "kimi_k25", "llama4")
TOKENS = torch.arange(8, 28)[None]


def load_as_text(folder):
    """Return a folder's text model with its weights, its reader and what is left of it."""
    model = build_model_on_meta(folder)
    index = open_checkpoint(folder)
    layout = ModelLayout(model, index)
    left = check_against_model(model, index, layout)
    reader = SliceReader(index, layout)
    fill_buffers(model, reader)
    materialize(model, reader.fill_local, torch.device("cpu"))
    return model.eval(), reader, left


def write(model, reader, output_dir):
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    specs = [(name, tuple(tensor.shape), torch.float32) for name, tensor in state.items()]
    written = WrittenModel(reader.layout, model.config, None, None, base=reader)
    export_model(written, specs, state.items(), output_dir, is_writer=True)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_part_has_the_dtype_that_was_asked_for(tmp_path, family):
    save_tiny(family, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["text_config"].pop("dtype", None)
    path.write_text(json.dumps(config))
    model = build_model_on_meta(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_trained_and_the_rest_passes_through(tmp_path, family):
    base, output_dir = tmp_path / "base", tmp_path / "out"
    save_tiny(family, base)
    (base / "preprocessor_config.json").write_text("{}")
    model, reader, left = load_as_text(base)
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(logits(model), logits(whole.eval()))
    assert not [name for name in reader.layout.shapes if "vision" in name or "audio" in name]

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    write(model, reader, output_dir)
    ours, theirs = open_checkpoint(output_dir), open_checkpoint(base)
    assert set(ours) == set(theirs) and left == list(reader.layout.unused)
    assert all(torch.equal(ours.read(key), theirs.read(key)) for key in left)
    again, info = AutoModelForImageTextToText.from_pretrained(
        output_dir, dtype=torch.float32, output_loading_info=True
    )
    assert type(again) is type(whole) and not any(info.values())
    assert torch.equal(logits(again.eval()), logits(model))
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, output_dir))
    text = before["text_config"] | {"dtype": "float32"}
    assert after == before | {"text_config": text, "dtype": "float32"}
    assert (output_dir / "preprocessor_config.json").read_text() == "{}"


def test_what_was_trained_outlives_its_base(tmp_path):
    base, output_dir = tmp_path / "base", tmp_path / "out"
    save_tiny("kimi_k25", base)
    model, reader, left = load_as_text(base)
    file = base / "model.safetensors"
    file.unlink()
    with pytest.raises(CheckpointError) as error:
        write(model, reader, output_dir)
    assert str(error.value).startswith(f"{file} is gone, so that tensors of the base")
    stored = {key for name in reader.layout.shapes for key in reader.layout.sources(name)}
    assert left and set(open_checkpoint(output_dir)) == stored


def test_a_stray_tensor_is_no_part_of_the_whole(tmp_path):
    save_tiny("llama4", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file) | {"vision_model.stray": torch.ones(2)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r": 1 tensor unexpected \(vision_model.stray\)"):
        load_as_text(tmp_path)


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "qwen3_next", "gemma4"])
def test_the_first_layers_of_a_config_that_lists_them(tmp_path, family):
    """Lists with an entry for each layer are cut with the layers."""
    whole = save_tiny(family, tmp_path)
    model = build_model_on_meta(tmp_path, truncate_layers=2)
    index = open_checkpoint(tmp_path)
    check_against_model(model, index, ModelLayout(model, index), truncate_layers=2)
    names = dict(whole.named_parameters()).keys()
    kept = {name for name in names if ".layers.2." in name or ".layers.3." in name}
    ours = dict(model.named_parameters()).keys()
    assert ours and ours <= names - kept
