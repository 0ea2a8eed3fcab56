"""How a command ends: one sentence, its exit code, and all ranks with it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megablocks_utils.config.reader import HelpRequested
from megablocks_utils.errors import ConfigurationError, DataError
from megablocks_utils.processes.entry_point import run_entry_point

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


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


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
from megablocks_utils.errors import DataError
from megablocks_utils.processes.agreement import raise_on_all_ranks
from megablocks_utils.processes.entry_point import run_entry_point

def read(rank):
    if rank == 1:
        raise DataError("rank 1 cannot read data.json")

def main(argv):
    rank, path = int(argv[0]), argv[1]
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    raise_on_all_ranks(lambda: None)
    sys.stdout.write("before ")
    other = dist.new_group()
    if rank == 0:  # a collective that rank 1 never joins
        dist.all_reduce(torch.zeros(1), group=other, async_op=True)
    raise_on_all_ranks(lambda: read(rank))
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
