"""Environment, output folder, errors and exit codes around a run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megablocks_utils.config import parse_args
from megablocks_utils.config.reader import HelpRequested
from megablocks_utils.errors import ConfigurationError, DataError
from megablocks_utils.processes.launch import (
    LaunchEnvironment,
    broadcast_from_rank0,
    check_environment,
    raise_first_error,
    run_entry_point,
)

ROOT = Path(__file__).parents[2]
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
    assert check_environment(environ={}) == LaunchEnvironment(rank=0, local_rank=0, world_size=1)
    assert check_environment(environ=LAUNCHED) == LaunchEnvironment(
        rank=3, local_rank=1, world_size=4
    )
    config = parse_args(
        ["--use_megablocks_sharding", "True", "--ep_size", "1"], entry_point="fsdp2"
    )
    assert check_environment(config, {}) == LaunchEnvironment()


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


def test_agreement_without_a_process_group():
    raise_first_error(None)
    with pytest.raises(DataError, match="^mine$"):
        raise_first_error(DataError("mine"))
    assert broadcast_from_rank0(lambda: "mine") == "mine"
    with pytest.raises(DataError, match="^mine$"):
        broadcast_from_rank0(_raise_mine)


def _raise_mine():
    raise DataError("mine")


def _decide(rank):
    try:
        broadcast_from_rank0(_raise_mine if rank == 0 else pytest.fail)
    except DataError as error:
        return broadcast_from_rank0(lambda: rank), str(error)


def test_only_rank_0_is_asked(ranks2):
    assert ranks2.run(_decide) == [(0, "mine")] * 2


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
from megablocks_utils.errors import DataError
from megablocks_utils.processes.launch import raise_first_error, run_entry_point

def main(argv):
    rank, path = int(argv[0]), argv[1]
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    raise_first_error(None)
    sys.stdout.write("before ")
    other = dist.new_group()
    if rank == 0:  # a collective that rank 1 never joins
        dist.all_reduce(torch.zeros(1), group=other, async_op=True)
    raise_first_error(DataError("rank 1 cannot read data.json") if rank == 1 else None)
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
