"""Everything in an adapter file that would be dropped or misread is refused in one sentence."""

import peft
import pytest
import torch

from megablocks_utils.files import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from tests.support.tiny_adapters import (
    CONFIG,
    PEFT_WARNINGS,
    WEIGHTS,
    edit_settings,
    edit_tensors,
    save_fused_adapter,
)

pytestmark = PEFT_WARNINGS
LAYER = "base_model.model.model.layers.{}"
Q_PROJ = f"{LAYER}.self_attn.q_proj.lora_A.weight"
ROUTER = f"{LAYER}.mlp.gate.lora_A.weight"
OLD_ROUTER = f"{LAYER}.block_sparse_moe.gate.lora_A.weight"


def drop(folder, *words):
    """Remove the tensors in whose names all the words are."""
    edit_tensors(
        folder,
        lambda tensors: [
            tensors.pop(key) for key in [*tensors] if all(word in key for word in words)
        ],
    )


def add(folder, *keys):
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(4, 64) for key in keys}))


def test_no_such_folder(refusal, tmp_path):
    folder = tmp_path / "nowhere"
    assert refusal(folder) == f"the adapter folder {folder} does not exist"


def test_a_file_in_place_of_the_folder(refusal, fused):
    path = fused / WEIGHTS
    assert refusal(path) == f"{path} is a file, but an adapter folder is wanted"


def test_a_name_that_the_hub_does_not_have(refusal, monkeypatch):
    def download(name, **options):
        raise OSError("no network")

    monkeypatch.setattr("megablocks_utils.checkpoint.index.snapshot_download", download)
    assert refusal("owner/adapter") == (
        "'owner/adapter' is not a local folder, and fetching an adapter of that name from the Hub"
        " failed (OSError)"
    )


def test_no_weights(refusal, fused):
    (fused / WEIGHTS).unlink()
    assert refusal(fused) == f"the adapter folder {fused} has no {WEIGHTS}"


def test_pickled_weights(refusal, fused):
    (fused / WEIGHTS).rename(fused / "adapter_model.bin")
    assert refusal(fused) == (
        f"the adapter folder {fused} has no {WEIGHTS}: only adapter_model.bin, which is not read"
        " here"
    )


def test_a_damaged_file(refusal, fused):
    size = (fused / WEIGHTS).stat().st_size
    (fused / WEIGHTS).write_bytes((fused / WEIGHTS).read_bytes()[:-1])
    assert refusal(fused) == (
        f"{fused / WEIGHTS} is truncated: its header asks for {size} bytes, the file has {size - 1}"
    )


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ([ROUTER.format(0), ROUTER.format(1)], "2 tensors"),
        ([OLD_ROUTER.format(0)], "1 tensor"),
        ([f"{Q_PROJ.format(2)}"], "1 tensor"),
        ([f"{LAYER.format(0)}.self_attn.q_proj.lora_magnitude_vector.weight"], "1 tensor"),
        ([f"{LAYER.format(0)}.block_sparse_moe.experts.4.w1.lora_A.weight"], "1 tensor"),
        ([f"{LAYER.format(0)}.mlp.experts.0.gate_proj.lora_A.weight"], "1 tensor"),
        (["model.layers.0.self_attn.q_proj.lora_A.weight"], "1 tensor"),
    ],
)
def test_tensors_without_a_place(refusal, fused, keys, count):
    add(fused, *keys)
    assert refusal(fused) == (
        f"{fused / WEIGHTS} holds {count} that this model has no place for, first {keys[0]}:"
        " adapters can be on its experts and on k_proj, lm_head, o_proj, q_proj, v_proj (PEFT"
        f" {peft.__version__} wrote it)"
    )


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.lm_head.lora_A.weight",
        f"{LAYER.format(0)}.self_attn.v_proj.lora_B.weight",
    ],
)
def test_tensors_that_are_not_targeted(refusal, fused, key):
    add(fused, key)
    assert refusal(fused) == (
        f"{fused / WEIGHTS} holds 1 tensor that the targets in {CONFIG} leave out, first {key}"
    )


def test_layers_that_are_not_targeted(refusal, fused, separate):
    """PEFT would read layer 0 and drop the rest without a word."""
    edit_settings(fused, layers_to_transform=[0])
    assert refusal(fused) == (
        f"{fused / WEIGHTS} holds 4 tensors that the targets in {CONFIG} leave out, first"
        " base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
    )
    edit_settings(separate, layers_to_transform=0)
    assert "holds 28 tensors that the targets in" in refusal(separate)


def test_two_formats_in_one_file(refusal, fused):
    add(fused, f"{LAYER.format(1)}.block_sparse_moe.experts.3.w2.lora_A.weight")
    assert refusal(fused) == (
        f"{fused / WEIGHTS} holds adapters of experts in two formats, fused (gate_up_proj,"
        " down_proj) and per expert (w1, w3, w2)"
    )


def test_no_adapters_at_all(refusal, fused):
    drop(fused, "")
    assert refusal(fused) == f"{fused / WEIGHTS} holds no adapters"


@pytest.mark.parametrize(
    ("name", "words"), [("fused", (".experts.base_layer.",)), ("separate", (".w2.",))]
)
def test_some_projections_only_are_not_trained(refusal, request, name, words):
    folder = request.getfixturevalue(name)
    drop(folder, *words)
    assert refusal(folder) == (
        f"{folder / WEIGHTS} holds adapters on 2 of the 4 weights of experts, wanted are all or"
        " none: down_proj, gate_up_proj"
    )


@pytest.mark.parametrize(
    ("name", "words", "count", "first", "targets"),
    [
        ("fused", ("layers.1.self_attn.q_proj.lora_B",), 1, "self_attn.q_proj.lora_B", "q_proj"),
        ("fused", ("layers.1.self_attn.q_proj",), 2, "self_attn.q_proj.lora_A", "q_proj"),
        ("fused", ("layers.1",), 8, "self_attn.q_proj.lora_A", "down_proj, gate_up_proj, k_proj"),
        ("fused", ("layers.1.mlp.experts.lora_B",), 1, "mlp.experts.lora_B", "down_proj"),
        ("separate", ("layers.1", "experts.2.w1"), 2, "experts.2.w1.lora_A", "gate_up_proj"),
        (
            "separate",
            ("layers.1", "experts.3"),
            6,
            "experts.3.w1.lora_A",
            "down_proj, gate_up_proj",
        ),
    ],
)
def test_missing_tensors(refusal, request, name, words, count, first, targets):
    folder = request.getfixturevalue(name)
    drop(folder, *words)
    block = "block_sparse_moe." if first.startswith("experts.") else ""
    targets += ", q_proj" if targets.endswith("k_proj") else ""
    assert refusal(folder) == (
        f"{folder / WEIGHTS} lacks {count} {'tensor' if count == 1 else 'tensors'}, first"
        f" {LAYER.format(1)}.{block}{first}.weight: adapters on {targets} must be whole and in"
        f" every layer that {CONFIG} names"
    )


@pytest.mark.parametrize(
    ("name", "key", "shape", "wanted"),
    [
        ("fused", "self_attn.q_proj.lora_A", (4, 63), (4, 64)),
        ("fused", "self_attn.q_proj.lora_B", (64, 8), (64, 4)),
        ("fused", "mlp.experts.base_layer.lora_A", (12, 64), (16, 64)),
        ("fused", "mlp.experts.base_layer.lora_B", (96, 16), (192, 16)),
        ("fused", "mlp.experts.lora_A", (16, 64), (16, 96)),
        ("separate", "block_sparse_moe.experts.1.w2.lora_A", (4, 64), (4, 96)),
        ("separate", "block_sparse_moe.experts.1.w3.lora_B", (96, 2), (96, 4)),
    ],
)
def test_wrong_shapes(refusal, request, name, key, shape, wanted):
    folder = request.getfixturevalue(name)
    key = f"{LAYER.format(1)}.{key}.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(shape)}))
    assert refusal(folder) == (
        f"{key} in {folder / WEIGHTS} has shape {shape}, wanted is {wanted} by the model's sizes"
        " and rank 4 of the adapter's configuration"
    )


def test_another_rank_than_the_configuration_says(refusal, fused):
    edit_settings(fused, r=2, lora_alpha=4)
    assert refusal(fused) == (
        f"{Q_PROJ.format(0)} in {fused / WEIGHTS} has shape (4, 64), wanted is (2, 64) by the"
        " model's sizes and rank 2 of the adapter's configuration"
    )


def test_whole_numbers_for_weights(refusal, fused):
    key = Q_PROJ.format(0)
    edit_tensors(fused, lambda tensors: tensors.update({key: torch.zeros(4, 64).to(torch.int8)}))
    assert refusal(fused) == (
        f"{key} in {fused / WEIGHTS} has dtype torch.int8, wanted is one of floating point"
    )


@pytest.mark.parametrize(
    ("name", "words", "first"),
    [
        ("separate", (".w1.",), "block_sparse_moe.experts.0.w1"),
        ("separate", (".w3.",), "block_sparse_moe.experts.0.w3"),
    ],
)
def test_half_of_a_weight(refusal, request, name, words, first):
    folder = request.getfixturevalue(name)
    drop(folder, *words)
    assert f"first {LAYER.format(0)}.{first}.lora_A.weight" in refusal(folder)


@pytest.mark.parametrize(
    ("pattern", "module"),
    [
        ("layers.1.self_attn.q_proj", "self_attn.q_proj"),
        ("layers.1.mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj"),
    ],
)
def test_ranks_that_differ_are_not_trained(refusal, tmp_path, pattern, module):
    save_fused_adapter("mixtral", tmp_path, rank_pattern={pattern: 8}, alpha_pattern={pattern: 16})
    assert refusal(tmp_path) == (
        f"{tmp_path / CONFIG} gives model.layers.1.{module} rank 8 by rank_pattern, wanted is 4 as"
        " for the others"
    )


@pytest.mark.parametrize("target", ["k_proj", "gate_up_proj"])
def test_strengths_that_differ_are_not_trained(refusal, fused, target):
    edit_settings(fused, alpha_pattern={target: 9})
    module = {"k_proj": "self_attn.k_proj", "gate_up_proj": "mlp.experts.gate_up_proj"}[target]
    assert refusal(fused) == (
        f"{fused / CONFIG} gives model.layers.0.{module} the strength 2.25, wanted is that of"
        " lora_alpha and r, 2, for all adapters"
    )


def test_what_is_merged_but_not_trained_further(refusal, tmp_path):
    kinds = {
        "rslora": ({"use_rslora": True}, "sets use_rslora, but adapters are trained with"),
        "head": ({"target_modules": ["lm_head"]}, "also holds base_model.model.lm_head.base_layer"),
        "layers": ({"layers_to_transform": [0]}, "on others of this kind: only adapters in every"),
        "saved": ({"modules_to_save": ["norm"]}, "also holds base_model.model.model.layers.0"),
    }
    for name, (options, message) in kinds.items():
        save_fused_adapter("mixtral", tmp_path / name, **options)
        assert message in refusal(tmp_path / name)


def test_the_names_of_the_files_are_pefts():
    """Tests use names of their own."""
    assert (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME) == (CONFIG, WEIGHTS)
