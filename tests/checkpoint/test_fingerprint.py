"""Two models of one shape have two fingerprints; how one model is stored does not count."""

import time

import torch

from megablocks_utils.checkpoint.fingerprint import fingerprint_model_folder
from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.checkpoint.safetensors_header import TensorEntry
from tests.support.tiny_models import edit_config, save_tiny_model


def test_shard_layout_and_notes_in_the_config_do_not_count(tmp_path):
    save_tiny_model("mixtral", tmp_path / "a", sharded=True)
    save_tiny_model("mixtral", tmp_path / "b", sharded=False)
    edit_config(tmp_path / "b", transformers_version="9.9", _name_or_path="elsewhere")
    seen = fingerprint_model_folder(tmp_path / "a")
    assert seen == fingerprint_model_folder(tmp_path / "b")
    assert len(seen) == 64


def test_weights_of_every_kind_dtype_and_config_count(tmp_path):
    seen = set()

    def note(name, **options):
        save_tiny_model("mixtral", tmp_path / name, **options)
        seen.add(fingerprint_model_folder(tmp_path / name))

    note("base")
    kinds = ("q_proj.weight", "experts.down_proj", "input_layernorm.weight", "lm_head.weight")
    for number, kind in enumerate(kinds):

        def shift(model, kind=kind):
            for name, parameter in model.named_parameters():
                if name.endswith(kind):
                    parameter.data += 0.01

        note(str(number), prepare=shift)
    note("dtype", prepare=lambda model: model.to(torch.bfloat16))
    edit_config(tmp_path / "base", rms_norm_eps=0.5)
    seen.add(fingerprint_model_folder(tmp_path / "base"))
    assert len(seen) == 3 + len(kinds)


def test_reads_are_bounded_for_a_model_of_many_tensors(tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    with weights.open("wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "config.json").write_text("{}")
    entries = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": TensorEntry(
            weights, 0, torch.bfloat16, (1024, 1024)
        )
        for layer in range(48)
        for expert in range(128)
        for name in ("up_proj", "gate_proj", "down_proj")
    }
    index = CheckpointIndex(tmp_path, entries)
    target = "megablocks_utils.checkpoint.fingerprint.open_stored_checkpoint"
    monkeypatch.setattr(target, lambda _: index)
    read, asked = index.read_bytes, []
    monkeypatch.setattr(index, "read_bytes", lambda *args: asked.append(args) or read(*args))
    started = time.process_time()
    fingerprint_model_folder(tmp_path)
    assert time.process_time() - started < 1
    assert len(asked) == 3 * 16 * 2
