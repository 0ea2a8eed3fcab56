"""Runs on mounts that lack something, and on disks that fail, as a user meets them."""

import errno
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest

import train_accelerate_fsdp2
from megablocks_utils import files
from megablocks_utils.checkpoint.manifest import check_files, read_manifest
from megablocks_utils.errors import UserError
from megablocks_utils.processes.claim_file import CLAIM_NAME
from megablocks_utils.processes.output_folder import find_checkpoints
from tests.support.parity import write_examples
from tests.support.tiny_models import save_tiny_model

TOKEN = "s3cr3t-" + "y" * 20


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A folder with a tiny model and data."""
    folder = tmp_path_factory.mktemp("mounts")
    save_tiny_model("olmoe", folder / "model")
    write_examples(folder / "data.json", 16)
    return folder


def _argv(ground: Path, name: str, *words: str) -> list[str]:
    options = (
        f"--model_name_or_path {ground}/model --data_path {ground}/data.json --output_dir "
        f"{ground / name} --use_megablocks_sharding True --per_device_train_batch_size 4 "
        "--save_strategy steps --save_steps 1 --verify_kernel False"
    )
    return [*options.split(), *words]


def _failing(name: str, number: int, kinds=lambda *paths: True):
    """Return a patch under which a call of `os` fails where `kinds` says so."""
    call = getattr(os, name)

    def run(*args, **kwargs):
        if kinds(*args):
            raise OSError(number, os.strerror(number))
        return call(*args, **kwargs)

    return mock.patch.object(os, name, run)


def _is_taken(_source, target, **_) -> bool:
    return os.path.lexists(target)


def _is_folder(path, *_) -> bool:
    return Path(path).is_dir()


def _run(rank: int, argv: list[str], *patches: tuple) -> str:
    """Run the script on a mount that is poor in the way of the patches; return its sentence."""
    files._told.clear()
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(_failing(*patch))
        words = ["train.py", *argv, "--hub_token", TOKEN]  # FSDP1's: it is not read here
        stack.enter_context(mock.patch.object(sys, "argv", words))
        try:
            train_accelerate_fsdp2.main(argv)
        except UserError as error:
            return str(error)
    return ""


POOR = (
    ("symlink", errno.ENOTSUP),
    ("open", errno.EINVAL, _is_folder),
    ("replace", errno.EEXIST, _is_taken),
    ("rename", errno.EPERM, _is_taken),
)


def test_a_mount_without_links_syncs_and_replacing_loses_nothing(ranks2, ground):
    folder, words = ground / "poor", ("--save_total_limit", "2")
    assert ranks2.run(_run, _argv(ground, "poor", "--max_steps", "3", *words), *POOR) == ["", ""]
    assert (folder / "checkpoint-latest").read_text() == "checkpoint-3\n"
    assert [step for step, _ in find_checkpoints(folder)] == [2, 3]
    written = read_manifest(folder / "checkpoint-3")["files"]
    check_files(folder / "checkpoint-3", written, written)
    assert not list(folder.glob(".*"))
    more = ("--max_steps", "4", "--resume_from_checkpoint", f"{folder}/checkpoint-latest")
    assert ranks2.run(_run, _argv(ground, "poor", *more, *words), *POOR) == ["", ""]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert (folder / "model.safetensors").is_file() and (folder / "run.json").is_file()


def _named(name: str):
    """Return what tells that a path has this name, or lies in a folder of it."""
    return lambda *paths: any(name in str(path) for path in paths)


FAULTS = {
    "run.json": ("replace", errno.EDQUOT, "run.json"),
    "loss.png": ("replace", errno.EIO, "loss.png"),
    "metrics.jsonl": ("replace", errno.EROFS, "metrics.jsonl"),
    "model": ("replace", errno.ENOSPC, ".model-being-written/model.safetensors"),
    "checkpoint": ("rename", errno.EIO, "checkpoint-2"),
}


CASES = [(what, ()) for what in FAULTS] + [("checkpoint", ("--async_save", "True"))]


@pytest.mark.parametrize(("what", "words"), CASES, ids=[" ".join([w, *o]) for w, o in CASES])
def test_a_disk_that_fails_is_one_sentence_and_earlier_checkpoints_stay(
    ranks2, ground, tmp_path, what, words
):
    call, number, name = FAULTS[what]
    folder = tmp_path / "out"
    argv = _argv(ground, str(folder), "--max_steps", "2", *words)
    answers = ranks2.run(_run_to_first_error, argv, (call, number, name))
    said = answers[0]
    assert os.strerror(number) in said and str(folder) in said and "\n" not in said
    if what == "metrics.jsonl":
        assert said.endswith(f"there is no complete checkpoint in {folder}")
        return
    kept = 1 if what == "checkpoint" else 2
    assert said.endswith(f"{folder}/checkpoint-{kept} is complete and kept")
    assert [step for step, _ in find_checkpoints(folder)] == list(range(1, kept + 1))
    assert '"state": "over"' in (folder / CLAIM_NAME).read_text()
    if what == "model":  # what was trained is still there
        assert "what could not be moved is complete in" in said
        assert (folder / ".model-being-written" / "model.safetensors").is_file()


def _run_to_first_error(rank: int, argv: list[str], patch: tuple) -> str:
    call, number, name = patch
    return _run(rank, argv, (call, number, _named(name)))


def test_no_secret_is_in_what_a_run_leaves(ranks2, ground):
    argv = _argv(ground, "secret", "--max_steps", "1", "--report_to", "tensorboard")
    assert ranks2.run(_run, argv) == ["", ""]
    left = {path.name: path.read_bytes() for path in (ground / "secret").rglob("*.*[!0-9]")
            if path.is_file()}  # fmt: skip
    assert {"run.json", "manifest.json", "metrics.jsonl"} <= left.keys()
    assert not [name for name, content in left.items() if TOKEN.encode() in content]
    assert b"--hub_token REDACTED" in left["run.json"]
