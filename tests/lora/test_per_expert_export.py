"""An adapter as servers load it: names and shapes written out, PEFT's logits, or one sentence."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from megablocks_utils.checkpoint.writer import SafetensorsWriter
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.export import ExportOptions, export_adapter_layout
from megablocks_utils.lora.file_check import AdapterCheckError
from tests.support.tiny_adapters import (
    OLD_NAMES,
    PEFT_WARNINGS,
    SIZES,
    WEIGHTS,
    save_fused_adapter,
    save_separate_adapter,
)
from tests.support.tiny_models import build_tiny_model, save_tiny_model

pytestmark = PEFT_WARNINGS
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PREFIX = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for family in ("mixtral", "qwen3_moe"):
        save_tiny_model(family, folder / family, sharded=False)
    build_tiny_model("gpt_oss").config.save_pretrained(folder / "gpt_oss")
    return folder


def export(folder, base):
    options = ExportOptions(
        folder / "out", None, str(folder / "adapter"), "per-expert", model_name_or_path=str(base)
    )
    return export_adapter_layout(options)


def logits_of_peft(family, folder):
    model = PeftModel.from_pretrained(build_tiny_model(family), folder).eval()
    with torch.no_grad():
        return model(torch.arange(3, 60)[None]).logits


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_pair_for_each_expert_and_projection(bases, tmp_path, family):
    """By name, not by our own layout: the first half of gate_up's rows is gate."""
    save_fused_adapter(family, tmp_path / "adapter")
    assert "28 LoRA pairs of rank 4" in export(tmp_path, bases / family)
    fused, written = (
        load_file(tmp_path / "adapter" / WEIGHTS),
        load_file(tmp_path / "out" / WEIGHTS),
    )
    block, (gate, up, down) = OLD_NAMES[family]
    wanted = {key: tensor for key, tensor in fused.items() if ".self_attn." in key}
    for layer in range(2):
        experts = f"{PREFIX}.{layer}.mlp.experts"
        for number in range(4):
            rows, columns = slice(4 * number, 4 * number + 4), slice(number, None, 4)
            lora_a, lora_b = (fused[f"{experts}.base_layer.lora_{s}.weight"] for s in "AB")
            num_gate = SIZES[0][0]
            pairs = {
                gate: (lora_a[rows], lora_b[:num_gate, columns]),
                up: (lora_a[rows], lora_b[num_gate:, columns]),
                down: (
                    fused[f"{experts}.lora_A.weight"][rows],
                    fused[f"{experts}.lora_B.weight"][:, columns],
                ),
            }
            for name, pair in pairs.items():
                for side, factor in zip("AB", pair, strict=True):
                    key = f"{PREFIX}.{layer}.{block}.experts.{number}.{name}.lora_{side}.weight"
                    wanted[key] = factor
    assert written.keys() == wanted.keys()
    assert not [key for key in wanted if not torch.equal(written[key], wanted[key])]


@pytest.mark.parametrize(
    ("given", "r", "lora_alpha"),
    [
        ({"use_rslora": True}, 4, 16),  # SGLang does not read use_rslora
        ({"rank_pattern": {EXPERTS[0]: 8}, "alpha_pattern": {EXPERTS[0]: 16}}, 8, 16),
        ({"target_parameters": EXPERTS[:1], "layers_to_transform": [1]}, 4, 8),
    ],
)
def test_one_rank_and_one_strength_and_all_projections(bases, tmp_path, given, r, lora_alpha):
    save_fused_adapter("mixtral", tmp_path / "adapter", **given)
    export(tmp_path, bases / "mixtral")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    seen = [settings[key] for key in ("r", "lora_alpha", "use_rslora", "rank_pattern")]
    assert seen == [r, lora_alpha, False, {}]
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {min(tensor.shape) for tensor in tensors.values()} == {r}
    assert sum(".experts." in key for key in tensors) == 2 * 4 * 3 * 2
    wanted, written = (logits_of_peft("mixtral", tmp_path / name) for name in ("adapter", "out"))
    torch.testing.assert_close(written, wanted, rtol=1e-5, atol=1e-5)


REFUSALS = {
    "alpha": "multiplies model.layers.0.self_attn.k_proj by 2 and model.layers.0.self_attn.q_proj",
    "router": "is on the router model.layers.0.mlp.gate too, where servers apply none",
    "whole": "replaces lm_head.weight, and servers load LoRA pairs only",
    "separate": "has one pair for each expert and projection already; serve it as it is.",
    "gpt_oss": "gpt_oss stores all experts of a layer in one tensor",
}
OPTIONS = {
    "alpha": {"alpha_pattern": {"q_proj": 4}},
    "router": {"target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    "whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_servers_would_not_apply_is_refused(bases, tmp_path, kind):
    family = "gpt_oss" if kind == "gpt_oss" else "mixtral"
    if kind == "separate":
        save_separate_adapter("mixtral", tmp_path / "adapter")
    else:
        save_fused_adapter(family, tmp_path / "adapter", **OPTIONS.get(kind, {}))
    with pytest.raises(ConfigurationError) as error:
        export(tmp_path, bases / family)
    assert error.value.as_options().startswith("--adapter_layout is per-expert, but ")
    assert REFUSALS[kind] in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_file_that_does_not_turn_back_is_not_kept(bases, tmp_path, monkeypatch):
    save_fused_adapter("mixtral", tmp_path / "adapter")
    append = SafetensorsWriter.append

    def spoil(writer, name, tensor):
        append(
            writer,
            name,
            tensor.flip(0) if ".1.block_sparse_moe.experts.3.w3.lora_B" in name else tensor,
        )

    monkeypatch.setattr(SafetensorsWriter, "append", spoil)
    with pytest.raises(AdapterCheckError, match=r"layers\.1\.mlp\.experts.* turned back differs"):
        export(tmp_path, bases / "mixtral")
    assert not (tmp_path / "out").exists()


def test_names_are_those_of_the_bases_own_files(bases, tmp_path):
    """Transformers' way back to the Hub's names need not be the one that the base took."""
    base = shutil.copytree(bases / "qwen3_moe", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file(
        {key.removeprefix("model."): t for key, t in weights.items()}, base / "model.safetensors"
    )
    save_fused_adapter("qwen3_moe", tmp_path / "adapter", target_modules=["q_proj"])
    export(tmp_path, base)
    keys = load_file(tmp_path / "out" / WEIGHTS).keys()
    assert all(key.startswith("base_model.model.layers.") for key in keys)
