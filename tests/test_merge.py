"""The command writes a whole model folder or none, and says in one sentence what is wrong."""

import errno
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megablocks_utils import merge
from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.writer import SafetensorsWriter
from megablocks_utils.config.reader import HelpRequested
from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.files import STAGING_FOLDER_NAME
from megablocks_utils.lora.trained_format import build_metadata
from megablocks_utils.merge import MergeOptions, main, merge_adapter, parse_options
from tests.support.merged import assert_same_model, merge_with_peft, save_base
from tests.support.tiny_adapters import PEFT_WARNINGS, edit_settings, save_fused_adapter
from tests.support.tiny_models import edit_config, save_tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
pytestmark = PEFT_WARNINGS


@pytest.fixture
def folder(tmp_path):
    """A base with tokenizer, and an adapter that names it."""
    save_base("mixtral", tmp_path / "base", sharded=False, vocab_size=400)
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "run.json").write_text("{}")
    save_fused_adapter("mixtral", tmp_path / "adapter")
    edit_settings(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path


def options_of(folder, **changes):
    given = {"adapter": str(folder / "adapter"), "output": folder / "out"}
    return MergeOptions(**given | changes)


def test_the_dtype_asked_for(folder):
    merge_adapter(options_of(folder))
    merge_adapter(options_of(folder, output=folder / "half", save_dtype="float16"))
    merged, half = (load_file(folder / out / "model.safetensors") for out in ("out", "half"))
    assert merged.keys() == half.keys()
    for key, tensor in merged.items():
        assert torch.equal(half[key], tensor.half())
    assert json.loads((folder / "half" / "config.json").read_text())["dtype"] == "float16"
    assert next(iter(merged.values())).dtype != torch.float16


def test_several_files_and_all_that_belongs_to_the_model(folder):
    merge_adapter(options_of(folder), max_shard_bytes=200_000)
    out, base = folder / "out", folder / "base"
    names = {path.name for path in out.iterdir()}
    weights = {name for name in names if name.startswith("model")}
    assert len(weights) > 3 and "model.safetensors.index.json" in weights
    assert names - weights == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } | {path.name for path in base.glob("chat_template*")}
    for name in names - weights:
        assert (out / name).read_bytes() == (base / name).read_bytes()
    merge_with_peft(base, folder / "adapter", folder / "wanted")
    assert_same_model(out, folder / "wanted")
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info


def test_the_format_that_it_was_trained_on_is_said(folder):
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path), path, build_metadata("nf4"))
    hint = "was trained on experts in nf4: --expert_quantization nf4 merges it into these"
    assert hint in merge_adapter(options_of(folder))
    save_file(load_file(path), path, {"expert_quantization": "a later one"})
    assert "trained on" not in merge_adapter(options_of(folder, output=folder / "other"))


def test_as_a_command(folder, monkeypatch, capsys):
    words = ["--adapter", str(folder / "adapter"), f"--output={folder / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["merge", *words])
    monkeypatch.delitem(sys.modules, "megablocks_utils.merge")
    runpy.run_module("megablocks_utils.merge", run_name="__main__")
    printed = capsys.readouterr().out
    number = f"{open_checkpoint(folder / 'base').total_bytes:,}"
    assert printed == f"wrote {folder / 'out'}: 28 of 41 tensors changed, {number} bytes\n"
    merge_with_peft(folder / "base", folder / "adapter", folder / "wanted")
    assert_same_model(folder / "out", folder / "wanted")


def test_an_error_of_the_command_is_one_sentence_with_exit_code_2(tmp_path):
    code = (
        "import sys; from megablocks_utils.merge import *; from megablocks_utils import merge\n"
        "try:\n    merge.run_entry_point(main, ['--adapter', 'x'])\n"
        "finally:\n    assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "--output is not given, but it must be a folder.\n"


def test_nothing_is_written_to_a_folder_in_use(folder):
    out = folder / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError) as error:
        merge_adapter(options_of(folder))
    assert str(error.value) == (
        f"--output is {out}, but it holds notes.txt; it must be a new or empty folder."
    )
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_an_empty_folder_and_one_that_a_killed_run_left_will_do(folder):
    left = folder / "out" / STAGING_FOLDER_NAME
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    merge_adapter(options_of(folder))
    assert not left.exists() and (folder / "out" / "config.json").is_file()


def test_an_output_that_cannot_be_looked_into(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(ConfigurationError) as error:
        merge_adapter(options_of(folder))
    assert str(error.value) == (
        f"--output is {folder / 'out'}, but it cannot be read (Permission denied)."
    )


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_in_place_of_the_output(folder, inside):
    path = folder / "file"
    path.write_text("")
    output = path / "out" if inside else path
    with pytest.raises(ConfigurationError) as error:
        merge_adapter(options_of(folder, output=output))
    which = str(path) if inside else "that"
    assert str(error.value) == (
        f"--output is {output}, but {which} is a file; it must be a new or empty folder."
    )


def test_no_base_is_named(folder):
    edit_settings(folder / "adapter", base_model_name_or_path=None)
    with pytest.raises(ConfigurationError) as error:
        merge_adapter(options_of(folder))
    assert error.value.as_options() == (
        f"--model_name_or_path is not given, and {folder / 'adapter' / 'adapter_config.json'} names"
        " no base_model_name_or_path; give the base model of this adapter."
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "{}/nowhere"}, "the adapter folder {}/nowhere does not exist"),
        ({"model_name_or_path": "{}/nowhere"}, "the model folder {}/nowhere does not exist"),
        ({"model_name_or_path": "{}/adapter"}, "the model folder {}/adapter has no config.json"),
        ({"model_name_or_path": "{}/other"}, "k_proj.lora_B.weight in {}/adapter/adapter_model"),
    ],
)
def test_what_cannot_be_used_is_named_and_leaves_nothing(folder, changes, message):
    save_tiny_model("mixtral", folder / "other", num_attention_heads=2)
    changes = {name: value.format(folder) for name, value in changes.items()}
    with pytest.raises(CheckpointError, match=re.escape(message.format(folder))):
        merge_adapter(options_of(folder, **changes))
    assert not (folder / "out").exists()


def test_a_base_that_lacks_a_tensor_is_refused(folder):
    path, key = folder / "base" / "model.safetensors", "model.norm.weight"
    save_file({k: tensor for k, tensor in load_file(path).items() if k != key}, path)
    with pytest.raises(CheckpointError) as error:
        merge_adapter(options_of(folder))
    fault = f"does not fit its config.json: 1 tensor missing ({key})"
    assert str(error.value) == f"{folder / 'base'} {fault}"
    assert not (folder / "out").exists()


def test_a_sum_that_is_not_finite_is_refused(folder):
    edit_settings(folder / "adapter", lora_alpha=1e42)
    with pytest.raises(CheckpointError) as error:
        merge_adapter(options_of(folder, output=folder / "new" / "out"))
    assert re.fullmatch(
        r"model\.layers\.0\.\S+ with the adapter added is not finite", str(error.value)
    )
    assert not (folder / "new").exists()


def test_a_full_disk_is_said_and_leaves_nothing(folder, monkeypatch):
    append = SafetensorsWriter.append

    def failing_append(self, name, tensor):
        if "layers.1" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, name, tensor)

    monkeypatch.setattr(SafetensorsWriter, "append", failing_append)
    with pytest.raises(CheckpointError) as error:
        merge_adapter(options_of(folder))
    message = f"cannot write the model to {folder / 'out'}: No space left on device"
    assert str(error.value) == message
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--adapter is not given, but it must be a folder or Hub name."),
        ("--adapter a", "--output is not given, but it must be a folder."),
        ("--adapter --output b", "--adapter has no value, but it must be a folder or Hub name."),
        ("--adapter= --output b", "--adapter is empty, but it must be a folder or Hub name."),
        ("--adapter a --adapter c", "--adapter is given twice, as a and as c; give it once."),
        ("--adapter a --ouput b", "unknown option --ouput; did you mean --output?"),
        ("--model x", "unknown option --model; did you mean --model_name_or_path?"),
        ("a --output b", "a is not an option; write options as --name value."),
    ],
)
def test_options_that_are_wrong(words, message):
    with pytest.raises(ConfigurationError) as error:
        parse_options(words.split())
    assert str(error.value) == message


def test_options_are_read():
    assert parse_options(["--adapter", "a", "--output=b"]) == MergeOptions("a", Path("b"))
    words = ["--adapter", "c", "--output", "b", "--model-name-or-path=d=e"]
    assert parse_options(words) == MergeOptions("c", Path("b"), "d=e")


def test_options_come_from_a_file_too(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text("adapter: a\noutput: 2026-11-30\n")
    words = ["--config", str(path)]
    assert parse_options(words) == MergeOptions("a", Path("2026-11-30"))
    assert parse_options([*words, "--output", "b"]) == MergeOptions("a", Path("b"))


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_names_every_option(word):
    with pytest.raises(HelpRequested) as request:
        main(["--adapter", "a", word])
    text = str(request.value)
    for name in merge.COMMAND.names:
        assert f"\n  --{name} " in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_bar_is_shown_on_a_terminal_only(folder, monkeypatch, capsys):
    merge_adapter(options_of(folder))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    merge_adapter(options_of(folder, output=folder / "again"))
    seen = capsys.readouterr()
    assert seen.out == "" and "merging" in seen.err


def test_unchanged_tensors_keep_their_bits(folder):
    merge_adapter(options_of(folder))
    base = load_file(folder / "base" / "model.safetensors")
    merged = load_file(folder / "out" / "model.safetensors")
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert len(changed) == 28
    assert all(".experts." in key or "q_proj" in key or "k_proj" in key for key in changed)
    assert json.loads((folder / "out" / "config.json").read_text())["dtype"] == "float32"


def test_a_linked_file_of_the_base_is_not_copied(folder):
    secret = folder / "id_ed25519"
    secret.write_text("secret")
    (folder / "base" / "vocab.bpe").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"vocab\.bpe leads out of its folder"):
        merge_adapter(options_of(folder))
    assert not (folder / "out").exists()
    (folder / "base" / "vocab.bpe").unlink()
    (folder / "base" / "tokenizer.key").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"tokenizer\.key leads out of its folder"):
        merge_adapter(options_of(folder))


def test_the_config_is_what_stock_writes(folder):
    edit_config(folder / "base", architectures=None, use_cache=False, dtype=None)
    merge_with_peft(folder / "base", folder / "adapter", folder / "wanted")
    merge_adapter(options_of(folder))
    seen, wanted = (
        json.loads((folder / name / "config.json").read_text()) for name in ("out", "wanted")
    )
    assert seen == wanted
