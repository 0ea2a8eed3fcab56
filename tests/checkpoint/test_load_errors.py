"""Every fault of a model folder is named before, or when, its tensor is read."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.load import build_model_on_meta
from megablocks_utils.checkpoint.model_check import check_against_model
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.errors import CheckpointError
from megablocks_utils.fsdp.materialize import materialize
from tests.support.tiny_models import edit_config, save_tiny_model

BLOCK = "model.layers.0.block_sparse_moe"
NORM = "model.norm.weight"
EXPERTS = tuple(f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


@pytest.fixture
def folder(tmp_path):
    save_tiny_model("mixtral", tmp_path, sharded=False)
    return tmp_path


def edit_tensors(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def failure_of(action, *args, **kwargs):
    with pytest.raises(CheckpointError) as error:
        action(*args, **kwargs)
    return str(error.value)


def check(folder, **kwargs):
    index = open_checkpoint(folder)
    model = build_model_on_meta(folder, **kwargs)
    return check_against_model(model, index, ModelLayout(model, index), **kwargs)


def read_experts(folder, first, last):
    index, model = open_checkpoint(folder), build_model_on_meta(folder)
    layout = ModelLayout(model, index)
    reader = SliceReader(index, layout)
    for name in EXPERTS:
        local = torch.empty(last - first, *layout.shapes[name][1:])
        reader.fill_local(name, local, (first, 0, 0))


def test_missing_expert_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{BLOCK}.experts.2.w3.weight"))
    start = f"{folder} does not fit its config.json"
    message = f"{start}: 1 tensor missing ({BLOCK}.experts.2.w3.weight)"
    assert failure_of(check, folder) == message
    message = failure_of(read_experts, folder, 2, 4)
    assert message.startswith(f"{EXPERTS[0]} cannot be made of what is stored: ")


def test_missing_unexpected_and_misshaped_together(folder):
    def edit(tensors):
        for expert in range(4):
            tensors.pop(f"{BLOCK}.experts.{expert}.w1.weight")
        tensors["stray"] = torch.zeros(2)
        tensors[f"{BLOCK}.gate.weight"] = torch.zeros(3, 64)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    edit_tensors(folder, edit)
    missing = ", ".join(f"{BLOCK}.experts.{expert}.w1.weight" for expert in range(3))
    assert failure_of(check, folder) == (
        f"{folder} does not fit its config.json: 4 tensors missing ({missing}, ...);"
        " 1 tensor unexpected (stray);"
        f" 1 tensor of another shape ({BLOCK}.gate.weight is (3, 64) instead of (4, 64))"
    )


def test_misshaped_expert_when_read(folder):
    key = f"{BLOCK}.experts.1.w2.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(64, 95)}))
    message = failure_of(read_experts, folder, 0, 2)
    assert message.startswith(f"{EXPERTS[1]} cannot be made of what is stored: expert 1 of 4")
    shapes = f"({key} is (64, 95) instead of (64, 96))"
    assert failure_of(check, folder).endswith(f": 1 tensor of another shape {shapes}")


def test_more_experts_than_the_config_says(folder):
    edit_config(folder, num_local_experts=3)
    message = failure_of(check, folder)
    extra = ", ".join(f"{BLOCK}.experts.3.w{number}.weight" for number in (1, 2, 3))
    gates = [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in (0, 1)]
    shapes = ", ".join(f"{gate} is (4, 64) instead of (3, 64)" for gate in gates)
    assert message == (
        f"{folder} does not fit its config.json: 6 tensors unexpected ({extra}, ...);"
        f" 2 tensors of another shape ({shapes}); num_local_experts is 3, stored are 4"
    )


def test_further_layers_are_unexpected_unless_truncated(tmp_path):
    save_tiny_model("qwen3_moe", tmp_path, num_hidden_layers=3)
    check(tmp_path, truncate_layers=2)
    edit_config(tmp_path, num_hidden_layers=2)
    message = failure_of(check, tmp_path)
    assert message.startswith(
        f"{tmp_path} does not fit its config.json: 21 tensors unexpected (model.layers.2."
    )
    assert message.endswith("; num_hidden_layers is 2, stored are 3")


def test_non_finite_expert_is_named(folder):
    key = f"{BLOCK}.experts.3.w1.weight"

    def edit(tensors):
        tensors[key][5, 7] = float("nan")
        tensors[key][5, 8] = float("inf")

    edit_tensors(folder, edit)
    read_experts(folder, 0, 3)
    file = folder / "model.safetensors"
    message = failure_of(read_experts, folder, 3, 4)
    assert message == f"{key} in {file} holds 2 non-finite values"


def test_non_finite_dense_weight_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors[NORM][:1].fill_(float("nan")))
    index, model = open_checkpoint(folder), build_model_on_meta(folder)
    reader = SliceReader(index, ModelLayout(model, index))
    message = failure_of(materialize, model, reader.fill_local, torch.device("cpu"))
    assert message == f"{NORM} in {folder / 'model.safetensors'} holds 1 non-finite value"


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert (
        failure_of(build_model_on_meta, folder) == f"the model folder {folder} has no config.json"
    )


def test_config_that_is_not_json(folder):
    file = folder / "config.json"
    file.write_text('{"model_type": ')
    where = "Expecting value: line 1 column 16 (char 15)"
    assert failure_of(build_model_on_meta, folder) == f"{file} is not valid JSON: {where}"


@pytest.mark.parametrize(
    ("content", "fault"),
    [("[]", "holds no settings: its JSON is not an object"), ("{}", "names no model_type")],
)
def test_config_without_model_type(folder, content, fault):
    file = folder / "config.json"
    file.write_text(content)
    assert failure_of(build_model_on_meta, folder) == f"{file} {fault}"


def test_config_with_an_impossible_value(folder):
    edit_config(folder, hidden_size="wide")
    message = failure_of(build_model_on_meta, folder)
    assert message.startswith(f"the configuration in {folder} cannot be used: ")
    assert "hidden_size" in message and "\n" not in message


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"_attn_implementation": "somebody/kernel"},
            "the configuration in {folder} cannot be used",
        ),
        ({"pad_token_id": 10**12}, "the configuration in {folder} cannot be used: "),
        (
            {"attention_dropout": 2},
            "attention_dropout is 2 in {folder}/config.json, but it must be",
        ),
        (
            {"num_experts_per_tok": 9},
            "num_experts_per_tok is 9 in {folder}/config.json, but",
        ),
        ({"sliding_window": 10**30}, "sliding_window is 10"),
        ({"attention_dropout": "x"}, "attention_dropout is 'x' in {folder}/config.json, but it "),
    ],
)
def test_a_config_that_a_library_fails_on(folder, changes, sentence):
    edit_config(folder, **changes)
    message = failure_of(build_model_on_meta, folder)
    assert message.startswith(sentence.format(folder=folder))
    assert "\n" not in message


def test_a_generation_config_that_is_nested_too_deeply(folder):
    (folder / "generation_config.json").write_text("[" * 100_000)
    message = failure_of(build_model_on_meta, folder)
    assert message.startswith(f"the configuration in {folder} cannot be used: maximum recursion")


def test_dense_model_is_refused(tmp_path):
    LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    message = f"model_type 'llama' in {file} has no experts that transformers' experts interface"
    assert failure_of(build_model_on_meta, tmp_path).startswith(message)
