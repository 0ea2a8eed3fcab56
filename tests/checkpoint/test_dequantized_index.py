"""Published quantized weights are what their definition says, whatever part of them is read."""

import json
import random
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megablocks_utils.checkpoint import packed_weights
from megablocks_utils.checkpoint.index import open_checkpoint, open_safetensors_file
from megablocks_utils.checkpoint.quantization_config import (
    read_quantization,
    without_quantization,
)
from megablocks_utils.errors import CheckpointError
from tests.support.quantized import COMPRESSED, CONFIG_NAME, FILE_NAME, FORMS, compressed
from tests.support.reads import LiveBytes


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_any_part_is_that_of_the_definition(tmp_path, form, dtype):
    check_parts(tmp_path, FORMS[form](), dtype)


@pytest.mark.parametrize("is_of_expert", [True, False], ids=["expert", "dense"])
@pytest.mark.parametrize("form", COMPRESSED)
def test_any_part_is_what_compressed_tensors_unpacks(tmp_path, form, is_of_expert):
    pytest.importorskip("compressed_tensors")
    storage, weights = COMPRESSED[form]
    packed = compressed(storage, is_of_expert=is_of_expert, **weights)
    check_parts(tmp_path, packed, torch.float32)


def check_parts(folder, packed, dtype):
    index = open_checkpoint(packed.write(folder), dtype=dtype)
    assert set(index) == set(packed.weights)
    pick = random.Random(0)
    for key, weight in packed.weights.items():
        stored = packed.stored.get(key)
        is_plain = stored is not None and stored.dtype.itemsize > 1
        wanted = weight if is_plain else weight.to(dtype)
        assert (index.dtype(key), index.shape(key)) == (wanted.dtype, tuple(wanted.shape))
        assert torch.equal(index.read(key), wanted)
        raw = wanted.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert index.num_bytes(key) == len(raw)
        assert index.read_bytes(key, 7, 50) == raw[7:57]
        for _ in range(20):
            item = pick.randrange(len(wanted)) if wanted.dim() == 3 else None
            whole = wanted if item is None else wanted[item]
            start, stop = sorted(pick.randint(0, len(whole)) for _ in range(2))
            assert torch.equal(index.read_rows(key, start, stop, item=item), whole[start:stop])


def test_an_expert_is_read_alone_and_some_rows_at_a_time(tmp_path):
    packed = FORMS["mxfp4"]()
    key, weight = next(iter(packed.weights.items()))
    index = open_checkpoint(packed.write(tmp_path))
    expert_bytes = sum(packed.stored[key + end][0].nbytes for end in ("_blocks", "_scales"))
    with mock.patch.object(packed_weights, "_MAX_VALUES", 33 * 20), LiveBytes() as alive:
        rows = index.read_rows(key, 0, 64, item=1)
    assert torch.equal(rows, weight[1].bfloat16())
    # Its bytes, the result, and for 33 rows an index of 4 bytes, the values and two powers of two.
    assert alive.most <= 2 * expert_bytes + rows.nbytes + 64 * 20 * (4 + 2 + 4 + 4)


def test_a_text_model_says_it_too(tmp_path):
    packed = FORMS["fp8"]()
    index = open_checkpoint(packed.write(tmp_path, nested=True), dtype=torch.float32)
    assert torch.equal(index.read(next(iter(packed.weights))), next(iter(packed.weights.values())))
    assert index.notes == (f"{tmp_path}: 1 fp8 weights are read as float32",)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert without_quantization(config) == {"model_type": "any", "text_config": {}}


def test_what_it_said_of_activations_is_left_out_with_a_word(tmp_path):
    (note,) = open_checkpoint(FORMS["fp8_per_tensor"]().write(tmp_path)).notes
    assert note.endswith("are read as bfloat16; scales of activations (1) have no use")


def spoil(folder, edit):
    tensors = load_file(folder / FILE_NAME)
    edit(tensors)
    save_file(tensors, folder / FILE_NAME, metadata={"format": "pt"})


def refusal(folder):
    with pytest.raises(CheckpointError) as error:
        index = open_checkpoint(folder)
        for key in index:
            index.read(key)
    return str(error.value)


EXPERTS, MATRIX = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.1.up_proj"
SPOILED = {
    "no scales": (
        "mxfp4",
        lambda t: t.pop(f"{EXPERTS}_scales"),
        f"{EXPERTS}_blocks in {{}} is a part of a quantized weight, but {EXPERTS}_scales is"
        " missing",
    ),
    "scales of other blocks": (
        "mxfp4",
        lambda t: t.update({f"{EXPERTS}_scales": torch.ones(3, 20, 3, dtype=torch.uint8)}),
        f"{EXPERTS}_scales in {{}} has shape (3, 20, 3), wanted is (3, 20, 2) of uint8",
    ),
    "an exponent that is NaN": (
        "mxfp4",
        lambda t: t[f"{EXPERTS}_scales"][2, 3, 1:].fill_(255),
        f"{EXPERTS}_scales in {{}} holds 1 non-finite value",
    ),
    "stored twice": (
        "mxfp4",
        lambda t: t.update({EXPERTS: torch.ones(3, 64, 20)}),
        f"{EXPERTS} in {{}} is stored a second time, quantized",
    ),
    "no scale": (
        "fp8",
        lambda t: t.pop(f"{MATRIX}.weight_scale_inv"),
        f"{MATRIX}.weight in {{}} is stored as float8_e4m3fn, and has no scale",
    ),
    "no weight": (
        "fp8",
        lambda t: t.pop(f"{MATRIX}.weight"),
        f"{MATRIX}.weight_scale_inv in {{}} is the scale of a quantized weight, but"
        f" {MATRIX}.weight is not stored as one",
    ),
    "too few scales": (
        "fp8",
        lambda t: t.update({f"{MATRIX}.weight_scale_inv": torch.ones(5, 2)}),
        f"{MATRIX}.weight_scale_inv in {{}} has shape (5, 2), wanted is one scale for each block"
        f" of {MATRIX}.weight, (12, 16) in blocks of 4 x 8",
    ),
    "a scale that is NaN": (
        "fp8",
        lambda t: t[f"{MATRIX}.weight_scale_inv"][1:, 1].fill_(float("nan")),
        f"{MATRIX}.weight_scale_inv in {{}} holds 2 non-finite values",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_spoiled_is_refused_with_file_and_tensor(tmp_path, case):
    form, edit, wanted = SPOILED[case]
    FORMS[form]().write(tmp_path)
    spoil(tmp_path, edit)
    assert refusal(tmp_path) == wanted.format(tmp_path / FILE_NAME)


def test_floats_of_8_bits_are_nothing_by_themselves(tmp_path):
    packed = FORMS["fp8"]()
    packed.write(tmp_path)
    (tmp_path / CONFIG_NAME).write_text('{"model_type": "any"}')
    path = tmp_path / FILE_NAME
    seen = f"{MATRIX}.weight in {path} is stored as float8_e4m3fn"
    assert refusal(tmp_path) == f"{seen}, but {tmp_path / CONFIG_NAME} has no quantization_config"
    with pytest.raises(CheckpointError, match="stored as float8_e4m3fn, which is not read here"):
        open_safetensors_file(path)


@pytest.mark.parametrize("case", ["shape", "group", "scale"])
def test_what_of_compressed_tensors_is_spoiled(tmp_path, case):
    pytest.importorskip("compressed_tensors")
    storage, weights = COMPRESSED["kimi int4"]
    compressed(storage, **weights).write(tmp_path)
    name = "model.layers.0.mlp.experts.3.up_proj"
    edits = {
        "shape": lambda t: t.update({f"{name}.weight_shape": torch.tensor([36, 60])}),
        "group": lambda t: t.update({f"{name}.weight_scale": torch.ones(36, 3)}),
        "scale": lambda t: t.pop(f"{name}.weight_scale"),
    }
    wanted = {
        "shape": f"{name}.weight_shape in {{}} is (36, 60), but its scales are of (36, 64)",
        "group": f"{name}.weight_packed in {{}} has shape (36, 8), wanted is (36, 12) of int32",
        "scale": f"{name}.weight_packed in {{}} is a part of a quantized weight, but"
        f" {name}.weight_scale is missing",
    }
    spoil(tmp_path, edits[case])
    assert refusal(tmp_path) == wanted[case].format(tmp_path / FILE_NAME)


def test_two_schemes_are_told_apart_by_what_they_name(tmp_path):
    pytest.importorskip("compressed_tensors")
    experts = compressed(*COMPRESSED["kimi int4"][:1], **COMPRESSED["kimi int4"][1])
    shared = compressed(
        "float-quantized", is_of_expert=False, **COMPRESSED["float8 of channels"][1]
    )
    groups = [(experts, "re:.*experts[.].*proj$"), (shared, "re:.*shared_experts.*")]
    for packed, target in groups:
        (group,) = packed.settings["config_groups"].values()
        group.update(targets=[target], format=packed.settings["format"])
    experts.settings["config_groups"] = {
        # The first pattern is of the shared expert alone, the other one of both.
        "b": shared.settings["config_groups"]["group_0"],
        "a": experts.settings["config_groups"]["group_0"],
    }
    experts.settings["format"] = "mixed-precision"
    experts.stored |= shared.stored
    index = open_checkpoint(experts.write(tmp_path), dtype=torch.float32)
    for key, weight in (experts.weights | shared.weights).items():
        assert torch.equal(index.read(key), weight.float())


def test_a_package_that_is_missing_is_named_with_its_install_line(tmp_path, monkeypatch):
    name = "megablocks_utils.checkpoint.quantization_config.is_compressed_tensors_available"
    monkeypatch.setattr(name, lambda: False)
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": GROUP}}
    packed = FORMS["fp8"]()
    packed.settings = config
    assert refusal(packed.write(tmp_path)) == (
        f"{tmp_path / CONFIG_NAME} has quantization_config (quant_method 'compressed-tensors'),"
        " which is read with the package compressed-tensors 0.15 or later, and that is not"
        " installed; install it with: pip install compressed-tensors"
    )


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4}}
NOT_READ = {
    "gptq": ({"quant_method": "gptq"}, " (quant_method 'gptq')"),
    "awq": ({"quant_method": "awq"}, " (quant_method 'awq')"),
    "nvfp4": ({"quant_method": "nvfp4"}, " (quant_method 'nvfp4')"),
    "bitsandbytes": ({"load_in_4bit": True}, ""),
    "unknown": ({"quant_method": "bits", "x": 1}, " (quant_method 'bits')"),
    "words": ("fp8", ""),
    "nvfp4 of compressed-tensors": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"a": {**GROUP, "format": "nvfp4-pack-quantized"}},
        },
        " of format 'nvfp4-pack-quantized'",
    ),
    "rotated": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"a": GROUP},
            "transform_config": {"config_groups": {"u": 1}},
        },
        " with a transform_config",
    ),
    "sparse": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"a": GROUP},
            "sparsity_config": {"format": "sparse-24-bitmask"},
        },
        " with a sparsity_config",
    ),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", NOT_READ)
def test_other_kinds_are_refused_by_name_with_the_remedy(tmp_path, case, nested):
    settings, kind = NOT_READ[case]
    packed = FORMS["fp8"]()
    packed.settings = settings
    packed.write(tmp_path, nested=nested)
    with pytest.raises(CheckpointError) as error:
        read_quantization(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / CONFIG_NAME} has quantization_config{kind}: quantized weights are not read"
        " here in this form (read are compressed-tensors, fp8, mxfp8 and mxfp4); give the model"
        " that was quantized, or one that transformers has dequantized (model.dequantize(), then"
        " save_pretrained)"
    )
