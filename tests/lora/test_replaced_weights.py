"""Weights that a file holds whole: all that PEFT replaces is replaced, and no half is."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from megablocks_utils.errors import CheckpointError
from megablocks_utils.lora.adapter_reader import open_adapter
from megablocks_utils.merge import MergeOptions, merge_adapter
from tests.support.merged import assert_same_model, merge_with_peft
from tests.support.tiny_adapters import (
    CONFIG,
    PEFT_WARNINGS,
    WEIGHTS,
    edit_tensors,
    save_fused_adapter,
)
from tests.support.tiny_families import build_tiny
from tests.support.tiny_models import build_tiny_model

pytestmark = PEFT_WARNINGS
NORM = "base_model.model.model.norm.weight"


def test_buffers_of_a_saved_module_are_replaced_too(tmp_path):
    """A router's correction of its scores, which the family trains without gradients."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = build_tiny("deepseek_v3")
    model.save_pretrained(base)
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["o_proj"], modules_to_save=["gate"], r=2
    )
    peft_model = get_peft_model(model, config)
    buffers = [b for name, b in peft_model.named_buffers() if "modules_to_save" in name]
    assert len(buffers) == 3  # of the layers with experts
    for buffer in buffers:
        buffer += 0.25
    peft_model.save_pretrained(adapter)
    merge_with_peft(base, adapter, tmp_path / "wanted")
    line = merge_adapter(MergeOptions(str(adapter), tmp_path / "out", str(base)))
    assert_same_model(tmp_path / "out", tmp_path / "wanted")
    assert " 10 of " in line  # 4 of o_proj, and of 3 routers the weight and the buffer


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (
            lambda tensors: tensors.pop(NORM),
            f"{{folder}}/{WEIGHTS} has no {NORM}, though {CONFIG} has modules_to_save model.norm",
        ),
        (
            lambda tensors: tensors.update({NORM: torch.zeros(65)}),
            f"{NORM} in {{folder}}/{WEIGHTS} has shape (65,), wanted is (64,) by the model's sizes",
        ),
        (
            lambda tensors: tensors.update({NORM: tensors[NORM].int()}),
            f"{NORM} in {{folder}}/{WEIGHTS} has dtype torch.int32, wanted is one of floating"
            " point",
        ),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_what_cannot_replace_is_refused(refusal, tmp_path, edit, fault):
    save_fused_adapter("mixtral", tmp_path, modules_to_save=["model.norm"])
    edit_tensors(tmp_path, edit)
    assert refusal(tmp_path) == fault.format(folder=tmp_path)


@pytest.mark.parametrize("name", ["experts", "mlp"])
def test_whole_experts_are_refused(refusal, tmp_path, name):
    """Those that are named, and those inside of what is named."""
    save_fused_adapter("mixtral", tmp_path, target_parameters=None, modules_to_save=[name])
    assert refusal(tmp_path) == (
        f"{tmp_path / CONFIG} has modules_to_save {name}, which covers"
        " model.layers.0.mlp.experts.gate_up_proj: whole experts are not read from an adapter"
    )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tied_weights_are_refused(tmp_path):
    overrides = {"tie_word_embeddings": True}
    save_fused_adapter("mixtral", tmp_path, overrides=overrides, modules_to_save=["embed_tokens"])
    with pytest.raises(CheckpointError) as error:
        open_adapter(tmp_path, build_tiny_model("mixtral", **overrides))
    assert str(error.value) == (
        f"{tmp_path / WEIGHTS} replaces model.embed_tokens.weight, which is tied to another weight"
        " in this model"
    )
