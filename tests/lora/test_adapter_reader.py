"""The reader hands out what PEFT would add, and reads no more than it must."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.checkpoint.load import build_model_on_meta
from megablocks_utils.errors import CheckpointError
from megablocks_utils.lora import adapter_reader
from megablocks_utils.lora.adapter_reader import open_adapter
from megablocks_utils.lora.settings import LoraSettings, build_peft_config
from megablocks_utils.lora.trainable import settings_of_adapter
from tests.support.tiny_adapters import (
    ATTENTION,
    PEFT_WARNINGS,
    WEIGHTS,
    attach_random_adapters,
    edit_tensors,
    expert_deltas,
    save_fused_adapter,
    save_separate_adapter,
)
from tests.support.tiny_models import FAMILIES, build_tiny_model, save_tiny_model

pytestmark = PEFT_WARNINGS
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
SEPARATE = LoraSettings(4, 8, ATTENTION, {"gate_up_proj": 8, "down_proj": 4})
FUSED = LoraSettings(4, 8, ATTENTION, {"gate_up_proj": 4, "down_proj": 4})


def settings_of(folder, family="mixtral"):
    model = build_tiny_model(family)
    return settings_of_adapter(open_adapter(folder, model), model)


def load_with_peft(family, folder):
    return PeftModel.from_pretrained(build_tiny_model(family), folder)


def deltas_of(reader, ranges):
    """Return scaling * B @ A of every parameter of experts, read range by range."""
    deltas = {}
    for name in reader.expert_parameters:
        pairs = [reader.experts(name, experts) for experts in ranges]
        scaling = reader.expert_parameters[name].scaling
        deltas[name] = torch.cat([scaling * (b @ a) for a, b in pairs])
    return deltas


def assert_same(seen, wanted):
    assert set(seen) == set(wanted) and wanted
    for name, tensor in wanted.items():
        torch.testing.assert_close(seen[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("save", "settings"),
    [(save_fused_adapter, FUSED), (save_separate_adapter, SEPARATE)],
    ids=["fused", "separate"],
)
def test_hands_out_what_peft_adds(tmp_path, family, save, settings):
    save(family, tmp_path)
    reader = open_adapter(tmp_path, build_tiny_model(family))
    assert settings_of(tmp_path, family) == settings
    peft_model = load_with_peft(family, tmp_path)
    wanted = expert_deltas(peft_model)
    for ranges in ([range(4)], [range(0, 1), range(1, 3), range(3, 4)]):
        assert_same(deltas_of(reader, ranges), wanted)
    assert len(reader.linears) == 4
    for name in reader.linears:
        lora_a, lora_b = reader.linear(name)
        layer = peft_model.get_submodule(f"base_model.model.{name}")
        assert torch.equal(2.0 * (lora_b @ lora_a), layer.get_delta_weight("default"))


def test_separate_gate_and_up_lie_side_by_side(tmp_path):
    """By name, not by PEFT: gate is w1, its rows and its ranks come first."""
    tensors = save_separate_adapter("mixtral", tmp_path)
    lora_a, lora_b = open_adapter(tmp_path, build_tiny_model("mixtral")).experts(
        GATE_UP, range(2, 4)
    )
    assert (lora_a.shape, lora_b.shape) == ((2, 8, 64), (2, 192, 8))
    prefix = "base_model.model.model.layers.1.block_sparse_moe.experts"
    for row, expert in enumerate((2, 3)):
        gate_a, gate_b, up_a, up_b = (
            tensors[f"{prefix}.{expert}.{name}.lora_{side}.weight"]
            for name in ("w1", "w3")
            for side in "AB"
        )
        assert torch.equal(lora_a[row], torch.cat([gate_a, up_a]))
        assert torch.equal(lora_b[row, :96, :4], gate_b)
        assert torch.equal(lora_b[row, 96:, 4:], up_b)
        assert not lora_b[row, :96, 4:].any() and not lora_b[row, 96:, :4].any()


def save_again_with_peft(family, folder):
    load_with_peft(family, folder).save_pretrained(folder)


def save_again_with_our_settings(family, folder):
    model = build_tiny_model(family)
    config = build_peft_config(SEPARATE, model)
    attach_random_adapters(model, config).save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("save_again", [save_again_with_peft, save_again_with_our_settings])
def test_reads_back_a_separate_adapter_that_was_saved_again(tmp_path, family, save_again):
    save_separate_adapter(family, tmp_path)
    save_again(family, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    reader = open_adapter(tmp_path, build_tiny_model(family))
    assert settings_of(tmp_path, family) == SEPARATE
    assert_same(deltas_of(reader, [range(4)]), expert_deltas(load_with_peft(family, tmp_path)))


def test_a_rank_by_pattern_whose_strength_is_rounded(tmp_path):
    """25 * (1 / 3) / 25 is not 1 / 3."""
    save_fused_adapter(
        "mixtral",
        tmp_path,
        r=3,
        lora_alpha=1,
        rank_pattern={"gate_up_proj": 25},
        alpha_pattern={"gate_up_proj": 25 * (1 / 3)},
    )
    reader = open_adapter(tmp_path, build_tiny_model("mixtral"))
    ranks = {"gate_up_proj": 25, "down_proj": 3}
    assert settings_of(tmp_path) == LoraSettings(3, 1, ATTENTION, ranks)
    wanted = expert_deltas(load_with_peft("mixtral", tmp_path))
    assert_same(deltas_of(reader, [range(4)]), wanted)


def test_keeps_the_dtype_of_the_file(tmp_path):
    for save in (save_fused_adapter, save_separate_adapter):
        save("olmoe", tmp_path, dtype=torch.bfloat16)
        reader = open_adapter(tmp_path, build_tiny_model("olmoe"))
        name = next(iter(reader.linears))
        tensors = (*reader.linear(name), *reader.experts(GATE_UP, range(1, 2)))
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["attention", "experts"])
def test_adapters_on_attention_or_experts_alone(tmp_path, kind):
    save_fused_adapter("mixtral", tmp_path)
    is_left = {"attention": "self_attn", "experts": ".experts."}[kind]
    edit_tensors(
        tmp_path, lambda tensors: [tensors.pop(key) for key in [*tensors] if is_left not in key]
    )
    reader = open_adapter(tmp_path, build_tiny_model("mixtral"))
    assert bool(reader.linears) == (kind == "attention")
    settings = settings_of(tmp_path)
    assert bool(reader.expert_parameters) == bool(settings.expert_ranks) == (kind == "experts")
    assert settings.target_modules == (ATTENTION if kind == "attention" else ())


def test_target_modules_are_sorted(tmp_path):
    names = ["v_proj", "q_proj", "o_proj", "k_proj"]
    save_fused_adapter("mixtral", tmp_path, target_modules=names)
    assert settings_of(tmp_path).target_modules == tuple(sorted(names))


def test_a_model_on_meta_will_do(tmp_path):
    save_tiny_model("qwen3_moe", tmp_path / "base")
    save_fused_adapter("qwen3_moe", tmp_path / "adapter")
    model = build_model_on_meta(tmp_path / "base")
    assert settings_of_adapter(open_adapter(tmp_path / "adapter", model), model) == FUSED


class CountingIndex(CheckpointIndex):
    """Note every read: the tensor's name and the bytes."""

    def __init__(self, index, reads):
        super().__init__(index.folder, {key: index._entry(key) for key in index})
        self.reads = reads

    def read(self, key):
        tensor = super().read(key)
        self.reads.append((key.partition("experts.")[2], tensor.nbytes))
        return tensor

    def read_rows(self, key, start, stop):
        tensor = super().read_rows(key, start, stop)
        self.reads.append((key.partition("experts.")[2], tensor.nbytes))
        return tensor


@pytest.fixture
def reads(monkeypatch):
    """What is read from adapters opened in the test."""
    noted, really_open = [], adapter_reader.open_safetensors_file
    monkeypatch.setattr(
        adapter_reader,
        "open_safetensors_file",
        lambda path: CountingIndex(really_open(path), noted),
    )
    return noted


def test_reads_one_experts_rows_of_a_and_all_of_b(tmp_path, reads):
    save_fused_adapter("mixtral", tmp_path)
    reader = open_adapter(tmp_path, build_tiny_model("mixtral"))
    assert reads == []
    _, lora_b = reader.experts(GATE_UP, range(2, 3))
    assert reads == [
        ("base_layer.lora_A.weight", 4 * 64 * 4),
        ("base_layer.lora_B.weight", 192 * 16 * 4),
    ]
    assert lora_b.untyped_storage().nbytes() == lora_b.nbytes == 192 * 4 * 4


def test_reads_one_separate_expert_only(tmp_path, reads):
    save_separate_adapter("mixtral", tmp_path)
    reader = open_adapter(tmp_path, build_tiny_model("mixtral"))
    assert reads == []
    reader.experts(GATE_UP, range(2, 3))
    assert sorted(reads) == [
        ("2.w1.lora_A.weight", 4 * 64 * 4),
        ("2.w1.lora_B.weight", 96 * 4 * 4),
        ("2.w3.lora_A.weight", 4 * 64 * 4),
        ("2.w3.lora_B.weight", 96 * 4 * 4),
    ]


@pytest.mark.parametrize("save", [save_fused_adapter, save_separate_adapter])
def test_values_that_are_not_finite_are_refused_where_they_are_wanted(tmp_path, save):
    save("olmoe", tmp_path)
    module = {save_fused_adapter: "base_layer", save_separate_adapter: "2.up_proj"}[save]
    key = f"base_model.model.model.layers.1.mlp.experts.{module}.lora_B.weight"
    column = 2 if save is save_fused_adapter else 0  # rank 0 of expert 2
    edit_tensors(tmp_path, lambda tensors: tensors[key][95, column].fill_(float("inf")))
    reader = open_adapter(tmp_path, build_tiny_model("olmoe"))
    reader.experts(GATE_UP, range(0, 2))
    with pytest.raises(CheckpointError) as error:
        reader.experts(GATE_UP, range(2, 3))
    assert str(error.value) == f"{key} in {tmp_path / WEIGHTS} holds 1 non-finite value"


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("where", ["self_attn.q_proj", "mlp.experts.base_layer"])
def test_no_matrix_is_passed_over(tmp_path, where, side):
    save_fused_adapter("mixtral", tmp_path)
    key = f"base_model.model.model.layers.0.{where}.lora_{side}.weight"
    edit_tensors(tmp_path, lambda tensors: tensors[key][:1].fill_(float("nan")))
    reader = open_adapter(tmp_path, build_tiny_model("mixtral"))
    num_bad = load_file(tmp_path / WEIGHTS)[key].isnan().sum()
    with pytest.raises(CheckpointError) as error:
        if "self_attn" in where:
            reader.linear("model.layers.0.self_attn.q_proj")
        else:
            reader.experts("model.layers.0.mlp.experts.gate_up_proj", range(4))
    assert str(error.value) == f"{key} in {tmp_path / WEIGHTS} holds {num_bad} non-finite values"


def test_only_the_adapters_two_files_are_fetched(tmp_path, monkeypatch):
    save_fused_adapter("mixtral", tmp_path)
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return tmp_path

    monkeypatch.setattr("megablocks_utils.checkpoint.index.snapshot_download", download)
    open_adapter("owner/adapter", build_tiny_model("mixtral"))
    assert asked["name"] == "owner/adapter"
    assert asked["allow_patterns"] == ["adapter_config.json", "adapter_model.safetensors"]
