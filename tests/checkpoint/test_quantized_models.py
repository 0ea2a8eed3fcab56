"""Whole quantized models are read as stock transformers dequantizes them, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.quantization_config import load_dequantized, without_quantization
from tests.support.quantized_models import PUBLISHED, save_quantized


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
