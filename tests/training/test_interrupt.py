"""Signals that ask for a stop: remembered, agreed on, and final when somebody insists."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megablocks_utils.training.interrupt import StopRequest

ROOT = Path(__file__).resolve().parents[2]
ALONE = """
import sys, time
from megablocks_utils.training.interrupt import StopRequest
with StopRequest() as stop:
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    while not stop.agreed():
        time.sleep(0.01)
    sys.stdout.write(f"{stop.name}\\n")
    sys.stdout.flush()
    time.sleep(30)
"""


@pytest.fixture
def alone():
    """A process of its own that has said it is ready, and says which signal it was sent."""
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)]
)
def test_only_a_later_signal_ends_the_process(alone, first, second):
    alone.send_signal(first)
    assert alone.stdout.readline() == f"{first.name}\n"
    alone.send_signal(first)  # torchrun's copy of what the terminal has sent
    time.sleep(2.1)
    assert alone.poll() is None
    alone.send_signal(second)
    assert alone.wait(5) == -second


def test_handlers_are_as_before():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert not stop.agreed()
        assert stop.name == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
        assert stop.name == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def _stop_at(rank: int, asked_rank: int) -> tuple[int, str]:
    """Go on until all agree; the rank that is asked is so in the middle of micro-step 3."""
    with StopRequest() as stop:
        for micro_step in range(1, 10):
            if micro_step == 3 and rank == asked_rank:
                os.kill(os.getpid(), signal.SIGINT)
            if stop.agreed():
                if rank != asked_rank:  # its own first signal, after all: no reason to die
                    stop._received_s = None
                    os.kill(os.getpid(), signal.SIGTERM)
                return micro_step, stop.name
    return 0, ""


@pytest.mark.parametrize("asked_rank", [0, 1])
def test_one_asked_rank_stops_all_at_the_same_micro_step(ranks2, asked_rank):
    answers = ranks2.run(_stop_at, asked_rank)
    assert [micro_step for micro_step, _ in answers] == [3, 3]
    assert answers[asked_rank][1] == "SIGINT"
