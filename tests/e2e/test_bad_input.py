"""What users get wrong: one sentence, the same on every rank, and nothing written."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import train_accelerate_fsdp2
from megablocks_utils.config import OPTION_NAMES
from megablocks_utils.errors import ConfigurationError, UserError
from megablocks_utils.shard_moe_utils import shard_moe
from tests.support.tiny_models import build_tiny_model, save_tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RECORD = {"instruction": "Say hello.", "output": "Hello."}


def _call_main(rank: int, argv: list[str]) -> str:
    try:
        train_accelerate_fsdp2.main(argv)
    except UserError as error:
        return error.as_options(OPTION_NAMES)
    return "no error"


def _call_library(rank: int) -> tuple[str, str]:
    """Return what a Python caller reads, and what a script would show of it."""
    with pytest.raises(ConfigurationError) as caught:
        shard_moe(build_tiny_model("mixtral"), ep_size=3)
    return str(caught.value), caught.value.as_options(OPTION_NAMES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model that could be trained and data that could be learned."""
    save_tiny_model("mixtral", tmp_path / "model", sharded=False, vocab_size=400)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps([RECORD] * 4))
    return tmp_path


def _arguments(folder: Path, **changed: object) -> list[str]:
    options = {
        "model_name_or_path": folder / "model",
        "data_path": folder / "data.json",
        "output_dir": folder / "out",
        "use_megablocks_sharding": True,
        "max_steps": 1,
        **changed,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def _drop_expert(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def _truncate(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _set_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _nothing(folder: Path) -> None:
    pass


CASES = {
    "ep_size and world": (
        {"ep_size": 3},
        _nothing,
        "--ep_size is 3, but it must divide the 2 processes of this run; 1 and 2 would work.",
    ),
    "ep_size and experts": (
        {"ep_size": 2},
        lambda folder: save_tiny_model(
            "mixtral", folder / "model", sharded=False, num_local_experts=3
        ),
        "--ep_size is 2, but it must divide the 3 experts of this model; 1 would work.",
    ),
    "wrong value": (
        {"learning_rate": "fast"},
        _nothing,
        "--learning_rate is fast, but it must be a number of at least 0.",
    ),
    "unknown flag": (
        {"learning_rat": 1},
        _nothing,
        "unknown option --learning_rat; did you mean --learning_rate?",
    ),
    "kernel that cannot run these experts": (
        {"kernel": "grouped_mm"},
        lambda folder: save_tiny_model(
            "mixtral", folder / "model", sharded=False, vocab_size=400, intermediate_size=90
        ),
        "--kernel is grouped_mm, but grouped_mm needs intermediate_size (90) to be a "
        "multiple of 4 in float32; --kernel ",
    ),
    "kernel without adapters": (
        {"kernel": "scattermoe", "use_lora": "all"},
        _nothing,
        "--use_lora is all, but scattermoe runs experts without adapters",
    ),
    "missing adapter": (
        {"use_lora": "all", "resume_adapter": "{folder}/none"},
        _nothing,
        "the adapter folder {folder}/none does not exist",
    ),
    "missing data": (
        {"data_path": "{folder}/none.json"},
        _nothing,
        "--data_path {folder}/none.json does not exist",
    ),
    "empty data": ({}, _write("data.json", ""), "{folder}/data.json is empty"),
    "bad JSON line": (
        {"data_path": "{folder}/data.jsonl"},
        _write("data.jsonl", json.dumps(RECORD) + "\n{oops}\n"),
        "{folder}/data.jsonl:2",
    ),
    "unknown columns": ({}, _write("data.json", '[{"question": "why"}]'), "question"),
    "no response marker": (
        {},
        _write("data.json", '[{"output": "just text"}]'),
        "### Response:",
    ),
    "model missing": (
        {"model_name_or_path": "{folder}/nowhere"},
        _nothing,
        "{folder}/nowhere",
    ),
    "not an MoE": ({}, _set_config(model_type="llama"), "model_type 'llama'"),
    "truncated weights": ({}, _truncate, "{folder}/model/model.safetensors"),
    "missing expert": (
        {},
        _drop_expert,
        "model.layers.1.block_sparse_moe.experts.2.w3.weight",
    ),
    "occupied output": (
        {"output_dir": "{folder}/done"},
        lambda folder: (folder / "done").mkdir() or _write("done/run.json", "{}")(folder),
        "--output_dir is {folder}/done, but it holds a finished run (run.json); choose another "
        "folder or give --overwrite_output_dir True.",
    ),
    "output is a file": (
        {"output_dir": "{folder}/data.json"},
        _nothing,
        "--output_dir is {folder}/data.json, but that is a file; it must be a folder.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_on_every_rank_and_nothing_written(ranks2, folder, case):
    changed, spoil, wanted = CASES[case]
    spoil(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    changed = {name: str(value).format(folder=folder) for name, value in changed.items()}
    first, second = ranks2.run(_call_main, _arguments(folder, **changed))
    assert first == second
    assert wanted.format(folder=folder) in first
    assert "\n" not in first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_library_speaks_of_parameters_and_the_script_of_options(ranks2):
    wanted = "ep_size is 3, but it must divide the 2 processes of this run; 1 and 2 would work."
    assert ranks2.run(_call_library) == [(wanted, f"--{wanted}")] * 2


def test_exit_code_two_and_no_traceback(folder):
    """A whole process: the data is at fault, so torch and the model have been loaded."""
    (folder / "data.json").write_text("[]")
    command = [sys.executable, "train_accelerate_fsdp2.py", *_arguments(folder)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 2
    assert [line for line in answer.stderr.splitlines() if line] == [
        f"--data_path {folder}/data.json holds no records"
    ]
    assert not (folder / "out").exists()


def test_all_ranks_are_gone_within_seconds(folder):
    """An option is at fault: no rank imports torch, and torchrun ends the run at once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", "train_accelerate_fsdp2.py"]
    command += _arguments(folder, ep_size=0)
    start = time.monotonic()
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - start < 60  # most of it is torchrun's own import of torch
    sentences = [line for line in answer.stderr.splitlines() if line.startswith("--ep_size is 0")]
    assert sentences == ["--ep_size is 0, but it must be a whole number of at least 1."]
