"""Whole quantized models are read as stock transformers dequantizes them, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.load import build_model_on_meta, fill_buffers
from megablocks_utils.checkpoint.model_check import check_against_model
from megablocks_utils.checkpoint.model_folder import WrittenModel, export_model
from megablocks_utils.checkpoint.quantization_config import load_dequantized, without_quantization
from megablocks_utils.checkpoint.slices import SliceReader
from tests.support.quantized_models import PUBLISHED, save_quantized, to_fp8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_is_that_of_stock(tmp_path, name, dtype):
    if name == "kimi":
        pytest.importorskip("compressed_tensors")
    folder = save_quantized(name, tmp_path / "published")
    index = open_checkpoint(folder, dtype=dtype)
    plain = tmp_path / "plain"
    plain.mkdir()
    config = without_quantization(json.loads((folder / "config.json").read_text()))
    (plain / "config.json").write_text(json.dumps(config))
    save_file(
        {key: index.read(key) for key in index}, plain / "model.safetensors", {"format": "pt"}
    )
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **load_dequantized(folder))
    assert not hasattr(stock.config, "quantization_config")
    ours = AutoModelForCausalLM.from_pretrained(plain, dtype=dtype).state_dict()
    wanted = stock.state_dict()
    assert ours.keys() == wanted.keys()
    # Stock leaves the dtype of some that are not quantized.
    differing = [key for key in ours if not torch.equal(ours[key], wanted[key].to(ours[key].dtype))]
    assert differing == []


def stream(folder, dtype):
    """Return a model on meta, its reader, and every tensor of it as the reader fills it."""
    model, index = build_model_on_meta(folder), open_checkpoint(folder, dtype=dtype)
    layout = ModelLayout(model, index)
    check_against_model(model, index, layout)
    reader = SliceReader(index, layout)
    fill_buffers(model, reader)
    buffers = dict(model.named_buffers())
    tensors = {name: buffers.get(name) for name in layout.shapes if name not in layout.tied}
    for name, buffer in tensors.items():
        if buffer is None:
            tensors[name] = torch.empty(layout.shapes[name], dtype=dtype)
            reader.fill_local(name, tensors[name], (0,) * tensors[name].dim())
    return model, reader, tensors


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_streamed_weights_are_those_of_stock_and_are_saved_unpacked(tmp_path, name):
    folder, out = save_quantized(name, tmp_path / "published"), tmp_path / "out"
    (file,) = folder.glob("*.safetensors")
    extra = {"deepseek_v3": "model.layers.61.eh_proj.weight"}.get(name)
    if extra is not None:  # a head for several tokens, which transformers leaves out
        packed = to_fp8("eh_proj", torch.randn(64, 128))
        packed = {key.replace("eh_proj", extra): tensor for key, tensor in packed.items()}
        save_file(load_file(file) | packed, file, metadata={"format": "pt"})
    model, reader, tensors = stream(folder, torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **load_dequantized(folder)
    ).state_dict()
    assert [key for key, tensor in tensors.items() if not torch.equal(tensor, stock[key])] == []
    for key, whole in tensors.items():
        if whole.dim() == 3:
            part = torch.empty(1, 5, 7)
            reader.fill_local(key, part, (1, 33, 2))
            assert torch.equal(part[0], whole[1, 33:38, 2:9])

    written = WrittenModel(reader.layout, model.config, None, None, base=reader)
    specs = [(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()]
    export_model(written, specs, tensors.items(), out, is_writer=True)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    assert [key for key, tensor in tensors.items() if not torch.equal(tensor, again[key])] == []
    if extra is not None:
        stored = load_file(out / "model.safetensors")
        assert torch.equal(stored[extra], reader.index.read(extra))
        assert f"{extra}_scale_inv" not in stored
