"""A model is written in the dtype asked for, and no value becomes infinite on the way."""

import pytest
import torch
from safetensors.torch import load_file

from megablocks_utils.checkpoint.saved_dtype import cast_in_range, choose_saved_dtypes
from megablocks_utils.checkpoint.writer import SafetensorsWriter, TensorSpec
from megablocks_utils.errors import CheckpointError
from tests.support.tiny_families import build_tiny

NAME = "model.layers.0.mlp.experts.down_proj"


def test_what_transformers_keeps_in_float32_stays_so():
    model = build_tiny("deepseek_v3")
    saved_dtype = choose_saved_dtypes(model, "bfloat16")
    assert saved_dtype(NAME, torch.float32) == torch.bfloat16
    assert saved_dtype("model.tid2eid", torch.int64) == torch.int64
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert saved_dtype(bias, torch.float32) == torch.float32
    assert choose_saved_dtypes(model, None)(NAME, torch.float32) == torch.float32


def test_a_value_beyond_the_dtype_is_named_and_not_written_as_infinite(tmp_path):
    tensor = torch.tensor([[1.0, -70000.0]])
    specs = [TensorSpec(NAME, (1, 2), torch.float16)]
    with (
        pytest.raises(CheckpointError) as error,
        SafetensorsWriter(tmp_path, specs, max_shard_bytes=100) as writer,
    ):
        writer.append(NAME, tensor)
    assert str(error.value) == (
        f"save_dtype is float16, which ends at 65504, but {NAME} holds 70000; it must be bfloat16"
        " or float32"
    )


def test_what_was_not_finite_before_is_not_blamed_on_the_dtype(tmp_path):
    tensor = torch.tensor([[1.0, float("inf")]])
    assert cast_in_range(NAME, tensor, torch.float16).isinf().any()
    with SafetensorsWriter(
        tmp_path, [TensorSpec(NAME, (1, 2), torch.float16)], max_shard_bytes=100
    ) as writer:
        writer.append(NAME, torch.tensor([[1.0, 65504.0]]))
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored[NAME], torch.tensor([[1.0, 65504.0]]).half())
