"""An exported folder is what save_pretrained writes, and plain transformers loads it."""

import errno
import json
import weakref
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.model_folder import WrittenModel, export_model
from megablocks_utils.checkpoint.writer import SafetensorsWriter
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import STAGING_FOLDER_NAME
from tests.support.tiny_models import FAMILIES, build_tiny_model, save_tiny_model


def parameters_of(model):
    return [(n, p.detach()) for n, p in model.named_parameters(remove_duplicate=False)]


def specs_of(model, dtype=None):
    return [(name, tuple(p.shape), dtype or p.dtype) for name, p in parameters_of(model)]


def export(model, output_dir, *, tensors=None, tokenizer=None, dtype=None, is_writer=True):
    layout = ModelLayout.of_saved(model)
    export_model(
        WrittenModel(layout, model.config, model.generation_config, tokenizer),
        specs_of(model, dtype),
        parameters_of(model) if tensors is None else tensors,
        output_dir,
        is_writer=is_writer,
        max_shard_bytes=100_000,
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_save_pretrained_and_loads_back(tmp_path, family, tied):
    saved, exported = tmp_path / "saved", tmp_path / "exported"
    model = save_tiny_model(family, saved, tie_word_embeddings=tied)
    export(model, exported)
    theirs, ours = open_checkpoint(saved), open_checkpoint(exported)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours.read(key), theirs.read(key)) for key in theirs)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((exported / name).read_text()) == json.loads((saved / name).read_text())

    loaded, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.tie_word_embeddings == tied
    for (name, ours), (their_name, theirs) in zip(
        parameters_of(loaded), parameters_of(model), strict=True
    ):
        assert name == their_name and torch.equal(ours, theirs), name


def test_dtype_of_the_specs_is_what_is_written(tmp_path):
    model = build_tiny_model("mixtral")
    export(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for (name, ours), (_, theirs) in zip(parameters_of(loaded), parameters_of(model), strict=True):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs.to(torch.bfloat16)), name
    assert model.config.dtype != torch.bfloat16


def test_tokenizer_lies_beside_the_model(tmp_path):
    vocabulary = {"<unk>": 0, "hello": 1, "world": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")), unk_token="<unk>"
    )
    export(build_tiny_model("olmoe"), tmp_path, tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path)("world").input_ids == [2]


def test_generation_settings_that_save_pretrained_refuses_are_kept(tmp_path):
    model = build_tiny_model("mixtral")
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.6
    export(model, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.6


def test_one_tensor_is_held_at_a_time(tmp_path):
    model = build_tiny_model("mixtral")
    alive = []

    def gather():
        for name, parameter in parameters_of(model):
            assert not any(reference() is not None for reference in alive), name
            full = parameter.clone()
            alive.append(weakref.ref(full))
            pair = [(name, full)]
            del full
            yield pair.pop()

    export(model, tmp_path, tensors=gather())
    assert len(alive) == len(parameters_of(model))


def test_other_ranks_iterate_in_step_and_write_nothing(tmp_path):
    model = build_tiny_model("mixtral")
    seen = []

    def gather():
        for name, _ in parameters_of(model):
            seen.append(name)
            yield name, None

    export(model, tmp_path / "out", tensors=gather(), is_writer=False)
    assert seen == [name for name, _, _ in specs_of(model)]
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_after_the_other_ranks_are_let_go(tmp_path, monkeypatch):
    model = build_tiny_model("mixtral")
    append, seen = SafetensorsWriter.append, []

    def failing_append(self, name, tensor):
        if "layers.1" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, name, tensor)

    def gather():
        for name, parameter in parameters_of(model):
            seen.append(name)
            yield name, parameter

    monkeypatch.setattr(SafetensorsWriter, "append", failing_append)
    with pytest.raises(CheckpointError) as error:
        export(model, tmp_path, tensors=gather())
    message = f"cannot write the model to {tmp_path}: No space left on device"
    assert str(error.value) == message
    assert seen == [name for name, _, _ in specs_of(model)]
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_does_not_load(tmp_path, monkeypatch):
    model = build_tiny_model("qwen3_moe")
    replace = Path.replace

    def failing_replace(self, target):
        if self.name == "config.json":
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", failing_replace)
        with pytest.raises(CheckpointError) as error:
            export(model, tmp_path)
    staging = tmp_path / STAGING_FOLDER_NAME
    assert str(error.value) == (
        f"cannot write the model to {tmp_path}: Input/output error; what could not be moved is "
        f"complete in {staging}"
    )
    assert [path.name for path in staging.iterdir()] == ["config.json"]
    with pytest.raises(ValueError, match=r"^Unrecognized model in .* `model_type` key"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    export(model, tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
