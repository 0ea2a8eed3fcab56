"""What is stored in the format that experts are packed in keeps its bits, in file and memory."""

import pytest
import torch
from safetensors.torch import load_file

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.load import build_model_on_meta
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.checkpoint.stored_parts import find_kept_bits, read_stored_bits
from megablocks_utils.moe.expert_spec import find_expert_modules, read_expert_specs
from megablocks_utils.quantization.format_table import FORMATS
from megablocks_utils.quantization.weight_format import unpack
from tests.support.quantized_models import save_quantized

CASES = [("gpt_oss", "mxfp4"), ("deepseek_v3, own blocks", "fp8")]


def _open(folder):
    model, index = build_model_on_meta(folder), open_checkpoint(folder, dtype=torch.float32)
    specs = read_expert_specs(find_expert_modules(model))
    return next(iter(specs.items())), SliceReader(index, ModelLayout(model, index)), model


def _read_file(folder, name, path, projection, expert):
    """Return codes and scales (out, ...) of an expert as the file has them."""
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    if name == "gpt_oss":
        key = f"{path}.{projection}"
        return stored[f"{key}_blocks"][expert].flatten(1), stored[f"{key}_scales"][expert]
    parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
    keys = [f"{path}.{expert}.{part}.weight" for part in parts]
    codes = torch.cat([stored[key].view(torch.uint8) for key in keys])
    return codes, torch.cat([stored[f"{key}_scale_inv"] for key in keys])


@pytest.mark.parametrize(("name", "format_name"), CASES)
def test_bits_are_those_of_the_file(tmp_path, name, format_name):
    folder = save_quantized(name, tmp_path)
    (path, spec), reader, model = _open(folder)
    for projection in spec.projections:
        key, turned = f"{path}.{projection}", {"is_transposed": spec.is_transposed}
        seen = read_stored_bits(reader, key, 1, format_name=format_name, **turned)
        stored = _read_file(folder, name, path, projection, 1)
        assert all(torch.equal(*pair) for pair in zip(seen.values(), stored, strict=True))
        sizes = model.get_parameter(key).shape[1:]
        matrix = torch.empty(1, *sizes)
        reader.fill_local(key, matrix, (1, 0, 0))
        matrix = matrix[0].T if spec.is_transposed else matrix[0]
        parts = {part: tensor[None] for part, tensor in seen.items()}
        assert torch.equal(unpack(FORMATS[format_name], parts, matrix.shape[1])[0], matrix)
        again = FORMATS[format_name].pack(matrix.contiguous())
        assert any(not torch.equal(again[part], seen[part]) for part in seen)
    kept = find_kept_bits(reader, {path: spec}, format_name)
    assert kept == {f"{path}.{projection}" for projection in spec.projections}


@pytest.mark.parametrize(
    ("name", "format_name"), [("gpt_oss", "fp8"), ("deepseek_v3", "fp8"), ("minimax_m2", "nf4")]
)
def test_other_forms_are_packed_as_they_are_read(tmp_path, name, format_name):
    """Another format, and blocks of another size."""
    (path, spec), reader, _ = _open(save_quantized(name, tmp_path))
    key, turned = f"{path}.down_proj", {"is_transposed": spec.is_transposed}
    assert read_stored_bits(reader, key, 0, format_name=format_name, **turned) is None
    assert not find_kept_bits(reader, {path: spec}, format_name)
