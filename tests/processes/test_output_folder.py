"""The output folder: what is refused, kept and removed, and which checkpoint is taken."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from megablocks_utils.config import RunConfig, parse_args
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes.claim_file import CLAIM_NAME
from megablocks_utils.processes.output_claim import claim_output_dir as claim
from megablocks_utils.processes.output_folder import (
    check_output_dir,
    choose_checkpoint,
    find_checkpoints,
    find_incomplete,
)


def run_config(output_dir: Path | str, *more: str) -> RunConfig:
    return parse_args(["--output_dir", str(output_dir), *more], entry_point="fsdp2")


def claim_output_dir(config: RunConfig, environ: Mapping[str, str] = os.environ) -> Path:
    """Take the folder for a run that ends, in whatever way, at once."""
    held = claim(config, environ)
    assert held is not None
    held.release(is_done=False)
    return Path(config.output_dir)


def snapshot(folder: Path) -> dict[str, str]:
    """Return every file but a claim with its text, and every folder below `folder`."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != CLAIM_NAME]
    return {str(path): path.read_text() if path.is_file() else "folder" for path in paths}


@pytest.mark.parametrize(
    "name", ["run.json", "model.safetensors", "model-00001-of-2.safetensors",
             "adapter_model.safetensors"],
)  # fmt: skip
def test_finished_run_is_kept(tmp_path, name):
    (tmp_path / name).write_text("old")
    before = snapshot(tmp_path)
    for refuse in (check_output_dir, claim_output_dir):
        with pytest.raises(ConfigurationError) as caught:
            refuse(run_config(tmp_path))
        assert str(caught.value) == (
            f"--output_dir is {tmp_path}, but it holds a finished run ({name}); choose another "
            "folder or give --overwrite_output_dir True."
        )
    assert snapshot(tmp_path) == before


def test_overwriting_removes_the_old_run_only(tmp_path):
    ours = ["run.json", "metrics.jsonl", "model.safetensors", "model.safetensors.index.json"]
    for name in [*ours, "adapter_model.safetensors", "notes.txt"]:
        (tmp_path / name).write_text("old")
    config = run_config(tmp_path, "--overwrite_output_dir", "True")
    assert check_output_dir(config) == tmp_path
    assert len(snapshot(tmp_path)) == 6
    assert claim_output_dir(config) == tmp_path
    assert snapshot(tmp_path) == {str(tmp_path / "notes.txt"): "old"}


def test_new_folder_is_made_by_the_claim_alone(tmp_path):
    folder = tmp_path / "a" / "b"
    assert check_output_dir(run_config(folder)) == folder
    assert snapshot(tmp_path) == {}
    assert claim_output_dir(run_config(folder)) == folder
    assert snapshot(tmp_path) == {str(tmp_path / "a"): "folder", str(folder): "folder"}
    assert claim_output_dir(run_config(folder)) == folder


def test_output_places_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    before = snapshot(tmp_path)
    long_name = "x" * 300
    sentences = {
        "file": "--output_dir is file, but that is a file; it must be a folder.",
        "file/run": f"--output_dir is file/run, but {tmp_path}/file is a file; it must be a "
        "folder.",
        long_name: f"--output_dir is {long_name}, but it cannot be written (File name too long).",
    }
    for output_dir, sentence in sentences.items():
        for refuse in (check_output_dir, claim_output_dir):
            with pytest.raises(ConfigurationError) as caught:
                refuse(run_config(output_dir))
            assert str(caught.value) == sentence
    assert snapshot(tmp_path) == before


def test_folder_without_write_permission(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    # Not by chmod: root, whom tests may run as, writes everywhere.
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigurationError) as caught:
        check_output_dir(run_config(tmp_path))
    assert str(caught.value) == (
        f"--output_dir is {tmp_path}, but it cannot be written (Permission denied)."
    )


def test_claim_that_fails_half_way_leaves_nothing(tmp_path):
    folder = tmp_path / "a" / ("x" * 300)
    assert check_output_dir(run_config(folder)) == folder
    with pytest.raises(ConfigurationError) as caught:
        claim_output_dir(run_config(folder))
    assert str(caught.value) == (
        f"--output_dir is {folder}, but it cannot be made (File name too long)."
    )
    assert snapshot(tmp_path) == {}


OVERWRITE = ("--overwrite_output_dir", "True")
RESUME = ("--resume_from_checkpoint", "True")
AGENT = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": "/tmp/a/attempt_0/0/error.json"}
RESTART = {
    **AGENT,
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_ERROR_FILE": "/tmp/a/attempt_1/0/error.json",
}


def save(folder: Path, *names: str, complete: bool = True) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "weights").write_text("w")
        if complete:
            (folder / name / "manifest.json").write_text("{}")


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A folder as a run leaves it that was killed while it wrote its third checkpoint."""
    save(tmp_path, "checkpoint-9", "checkpoint-20")
    save(tmp_path, "checkpoint-21", "checkpoint-30.incomplete", complete=False)
    (tmp_path / "checkpoint-latest").symlink_to("checkpoint-20")
    save(tmp_path, "checkpoint-x", "other")
    (tmp_path / "metrics.jsonl").write_text("old")
    return tmp_path


def refusal(action, *arguments: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        action(*arguments)
    return str(caught.value)


def test_complete_and_incomplete_checkpoints(unfinished):
    assert find_checkpoints(unfinished) == [
        (9, unfinished / "checkpoint-9"),
        (20, unfinished / "checkpoint-20"),
    ]
    assert find_incomplete(unfinished) == [
        unfinished / "checkpoint-21",
        unfinished / "checkpoint-30.incomplete",
    ]
    assert find_checkpoints(unfinished / "none") == find_incomplete(unfinished / "none") == []


def test_a_manifest_in_a_folder_still_called_incomplete_does_not_count(tmp_path):
    save(tmp_path, "checkpoint-5.incomplete")
    assert find_checkpoints(tmp_path) == []


def test_which_checkpoint_is_taken(unfinished):
    newest, oldest = unfinished / "checkpoint-20", unfinished / "checkpoint-9"

    def chosen(wish):
        config = run_config(unfinished, "--resume_from_checkpoint", str(wish))
        return choose_checkpoint(config, {})

    assert choose_checkpoint(run_config(unfinished), {}) is None
    assert [chosen(wish) for wish in ("False", "false")] == [None, None]
    assert [chosen(wish) for wish in ("True", "true")] == [newest, newest]
    assert chosen("auto") == newest
    empty = run_config(unfinished / "none", "--resume_from_checkpoint", "auto")
    assert choose_checkpoint(empty, {}) is None
    assert chosen(oldest) == oldest
    assert chosen(unfinished / "checkpoint-latest") == newest.resolve()
    (unfinished / "checkpoint-latest").unlink()
    (unfinished / "checkpoint-latest").write_text("checkpoint-9\n")  # where there are no links
    assert chosen(unfinished / "checkpoint-latest") == oldest


def test_checkpoints_that_cannot_be_taken(unfinished, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    wanted = "it must be True, False, auto or the folder of a complete checkpoint"
    cases = {
        "none": f"that is no folder; {wanted}.",
        f"{unfinished}/metrics.jsonl": f"that is no folder; {wanted}.",
        f"{unfinished}/checkpoint-21": f"that holds no manifest.json; {wanted}.",
        str(unfinished): f"that holds no manifest.json; {wanted}, such as "
        f"{unfinished}/checkpoint-20.",
    }
    for wish, sentence in cases.items():
        config = run_config(empty, "--resume_from_checkpoint", wish)
        for refuse in (choose_checkpoint, check_output_dir, claim_output_dir):
            assert refusal(refuse, config, {}) == (
                f"--resume_from_checkpoint is {wish}, but {sentence}"
            )
    save(empty, "checkpoint-3.incomplete", "checkpoint-2", complete=False)
    assert refusal(check_output_dir, run_config(empty, *RESUME), {}) == (
        f"--resume_from_checkpoint is True, but --output_dir {empty} holds no complete checkpoint "
        "(never finished: checkpoint-2 and checkpoint-3.incomplete); start without "
        "--resume_from_checkpoint."
    )


def test_an_unfinished_run_is_kept(unfinished):
    before = snapshot(unfinished)
    for refuse in (check_output_dir, claim_output_dir):
        assert refusal(refuse, run_config(unfinished), {}) == (
            f"--output_dir is {unfinished}, but it holds checkpoints of a run that has not "
            "finished (the newest is checkpoint-20); give --resume_from_checkpoint True to resume "
            "it, another folder, or --overwrite_output_dir True."
        )
    assert snapshot(unfinished) == before


def test_only_complete_checkpoints_are_worth_a_refusal(tmp_path):
    save(tmp_path, "checkpoint-500", complete=False)  # may be Hugging Face's
    before = snapshot(tmp_path)
    claim_output_dir(run_config(tmp_path), {})
    assert snapshot(tmp_path) == before


def test_overwriting_removes_old_checkpoints(unfinished):
    claim_output_dir(run_config(unfinished, *OVERWRITE), {})
    assert sorted(path.name for path in unfinished.iterdir()) == [
        CLAIM_NAME,
        "checkpoint-x",
        "other",
    ]


@pytest.mark.parametrize("words", [RESUME, (*RESUME, *OVERWRITE)])
def test_resuming_removes_the_finished_model_alone(unfinished, words):
    before = snapshot(unfinished)
    for name in ("run.json", "model-00001-of-2.safetensors", "model.safetensors.index.json"):
        (unfinished / name).write_text("old")
    config = run_config(unfinished, *words)
    check_output_dir(config, {})
    assert len(snapshot(unfinished)) == len(before) + 3
    claim_output_dir(config, {})
    assert snapshot(unfinished) == before


@pytest.mark.parametrize("words", [(), OVERWRITE, RESUME])
def test_a_restart_goes_on_whatever_the_options_say(tmp_path, words):
    if words == RESUME:
        save(tmp_path, "checkpoint-2")
    config = run_config(tmp_path, *words)
    claim_output_dir(config, AGENT)
    assert check_output_dir(config, RESTART) == tmp_path  # before its first checkpoint, too
    save(tmp_path, "checkpoint-5", "checkpoint-10")
    (tmp_path / "model.safetensors").write_text("half")
    assert choose_checkpoint(config, RESTART) == tmp_path / "checkpoint-10"
    claim_output_dir(config, RESTART)
    assert choose_checkpoint(config, RESTART) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "model.safetensors").exists()


def test_a_restart_of_what_was_refused_is_refused_again(unfinished):
    """Torchrun restarts a run that ended with exit code 2, too."""
    claim_output_dir(run_config(unfinished, *RESUME), {**AGENT, "TORCHELASTIC_ERROR_FILE": "/b"})
    (unfinished / "run.json").write_text("finished")
    before = snapshot(unfinished)
    for environ in (AGENT, RESTART):
        assert "a finished run" in refusal(claim_output_dir, run_config(unfinished), environ)
    assert snapshot(unfinished) == before
    assert choose_checkpoint(run_config(unfinished, *OVERWRITE), RESTART) is None
    other_run = RESTART | {"TORCHELASTIC_RUN_ID": "7"}
    assert choose_checkpoint(run_config(unfinished), other_run) is None


def test_a_restart_on_another_machine_is_known_by_its_run(tmp_path, monkeypatch):
    claim_output_dir(run_config(tmp_path), AGENT)
    save(tmp_path, "checkpoint-5")
    name = type("Name", (), {"nodename": "elsewhere"})
    monkeypatch.setattr("os.uname", lambda: name)
    there = RESTART | {"TORCHELASTIC_ERROR_FILE": "/tmp/b/attempt_1/8/error.json"}
    assert choose_checkpoint(run_config(tmp_path), there) == tmp_path / "checkpoint-5"
    other_run = there | {"TORCHELASTIC_RUN_ID": "7"}
    assert choose_checkpoint(run_config(tmp_path), other_run) is None


def test_checkpoints_later_than_the_one_to_resume_from(unfinished, tmp_path_factory):
    (step, first), *_, (_, newest) = find_checkpoints(unfinished)
    words = ("--resume_from_checkpoint", str(first))
    assert refusal(check_output_dir, run_config(unfinished, *words)) == (
        f"--output_dir is {unfinished}, but it holds {newest.name}, which does not belong to a run "
        f"that resumes from {first}; choose another folder, or give --overwrite_output_dir True to "
        "delete it."
    )
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere, "checkpoint-1")
    for more in ((), ("--resume_from_checkpoint", str(elsewhere / "checkpoint-1"))):
        assert refusal(check_output_dir, run_config(unfinished, *more)).startswith(
            f"--output_dir is {unfinished}, but it holds "
        )
    check_output_dir(run_config(unfinished, "--resume_from_checkpoint", "True"))
    claim_output_dir(run_config(unfinished, *words, "--overwrite_output_dir", "True"))
    assert find_checkpoints(unfinished) == [(step, first)]
