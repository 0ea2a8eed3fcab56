"""Environment, output folder, errors and exit codes around a run."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from megablocks_utils.cli import HelpRequested
from megablocks_utils.config import RunConfig, parse_args
from megablocks_utils.errors import ConfigurationError, DataError
from megablocks_utils.launch import (
    Launch,
    agree_on_error,
    check_environment,
    check_output_dir,
    claim_output_dir,
    run_entry_point,
)

ROOT = Path(__file__).parents[1]
LAUNCHED = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


def run_config(output_dir: Path | str, *more: str) -> RunConfig:
    return parse_args(["--output_dir", str(output_dir), *more], entry_point="fsdp2")


def raise_(error: BaseException):
    def main(argv):
        raise error

    return main


def test_entry_point_hands_over_the_words():
    seen = []
    run_entry_point(seen.extend, ("--debug", "True"))
    assert seen == ["--debug", "True"]


def test_user_error_is_one_sentence_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        run_entry_point(raise_(DataError("data.json, line 3, is no JSON.")), [])
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "data.json, line 3, is no JSON.\n")


def test_other_ranks_are_silent_and_wait_for_rank_0(capsys, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        run_entry_point(raise_(ConfigurationError("no")), [])
    assert (caught.value.code, waits) == (2, [3.0])
    with pytest.raises(SystemExit) as caught:
        run_entry_point(raise_(HelpRequested("help")), [])
    assert (caught.value.code, waits) == (0, [3.0])
    assert capsys.readouterr() == ("", "")


def test_help_goes_to_standard_output(capsys):
    with pytest.raises(SystemExit) as caught:
        run_entry_point(raise_(HelpRequested("usage\n")), ["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr() == ("usage\n", "")


def test_defects_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_entry_point(raise_(ZeroDivisionError()), [])


def test_environments_that_work():
    assert check_environment(environ={}) == Launch(rank=0, local_rank=0, world_size=1)
    assert check_environment(environ=LAUNCHED) == Launch(rank=3, local_rank=1, world_size=4)
    config = parse_args(
        ["--use_megablocks_sharding", "True", "--ep_size", "1"], entry_point="fsdp2"
    )
    assert check_environment(config, {}) == Launch()


ENVIRONMENTS = [
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE is set, but RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT "
     "are missing from the environment; start with torchrun or accelerate launch, which set all "
     "of them."),
    ({**LAUNCHED, "RANK": None}, "WORLD_SIZE is set, but RANK is missing from the environment; "
     "start with torchrun or accelerate launch, which set all of them."),
    ({"RANK": "1", "LOCAL_RANK": "1"}, "RANK is set, but WORLD_SIZE, MASTER_ADDR and MASTER_PORT "
     "are missing from the environment; start with torchrun or accelerate launch, which set all "
     "of them."),
    ({**LAUNCHED, "RANK": "4"}, "RANK is 4, but it must be below WORLD_SIZE, which is 4."),
    ({**LAUNCHED, "LOCAL_RANK": "7"}, "LOCAL_RANK is 7, but it must be below WORLD_SIZE, which is "
     "4."),
    ({**LAUNCHED, "WORLD_SIZE": "0"}, "WORLD_SIZE is 0, but it must be a whole number of at least "
     "1."),
    ({**LAUNCHED, "WORLD_SIZE": "two"}, "WORLD_SIZE is two, but it must be a whole number of at "
     "least 1."),
    ({**LAUNCHED, "RANK": "-1"}, "RANK is -1, but it must be a whole number of at least 0."),
    ({**LAUNCHED, "LOCAL_RANK": ""}, "LOCAL_RANK is empty, but it must be a whole number of at "
     "least 0."),
]  # fmt: skip


@pytest.mark.parametrize(("environ", "sentence"), ENVIRONMENTS)
def test_environments_that_do_not(environ, sentence):
    environ = {name: value for name, value in environ.items() if value is not None}
    with pytest.raises(ConfigurationError) as caught:
        check_environment(environ=environ)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("entry_point", "line"),
    [
        ("fsdp2", "torchrun --nproc_per_node=4 train_accelerate_fsdp2.py ..."),
        (
            "fsdp1",
            "accelerate launch --num_processes 4 --config_file accelerate.yaml train_fsdp1.py ...",
        ),
    ],
)
def test_ep_size_without_a_launcher(entry_point, line):
    words = ["--use_megablocks_sharding", "True", "--ep_size", "4"]
    with pytest.raises(ConfigurationError) as caught:
        check_environment(parse_args(words, entry_point=entry_point), {})
    assert str(caught.value) == (
        "--ep_size is 4, but this is one process without a launcher; start 4 with: " + line
    )


def snapshot(folder: Path) -> dict[str, str]:
    """Return every file with its text and every folder below `folder`."""
    paths = sorted(folder.rglob("*"))
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


def test_agreement_without_a_process_group():
    agree_on_error(None)
    with pytest.raises(DataError, match="^mine$"):
        agree_on_error(DataError("mine"))


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
from megablocks_utils.errors import DataError
from megablocks_utils.launch import agree_on_error, run_entry_point

def main(argv):
    rank, path = int(argv[0]), argv[1]
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    agree_on_error(None)
    sys.stdout.write("before ")
    other = dist.new_group()
    if rank == 0:  # a collective that rank 1 never joins
        dist.all_reduce(torch.zeros(1), group=other, async_op=True)
    agree_on_error(DataError("rank 1 cannot read data.json") if rank == 1 else None)
    sys.stdout.write("after ")

run_entry_point(main, sys.argv[1:])
"""


def test_an_error_of_one_rank_ends_all_of_them(tmp_path):
    command = [sys.executable, "-c", TWO_RANKS]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            env={**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        out0, err0 = ranks[0].communicate(timeout=90)
        # Rank 1 still gives rank 0 time to speak: rank 0 waited for no destructor.
        assert ranks[1].poll() is None
        out1, err1 = ranks[1].communicate(timeout=90)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert (out0, out1) == ("before ", "before ")
    assert (err0, err1) == ("rank 1 cannot read data.json\n", "")
