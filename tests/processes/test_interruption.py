"""Signals that ask for a stop: remembered, agreed on, and final when somebody insists."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

import pytest
import torch.distributed as dist

from megablocks_utils.processes import interruption
from megablocks_utils.processes.early_signals import remember_early_signals
from megablocks_utils.processes.interruption import StopRequest
from tests.support.rank_pool import start_forkserver


def _be_alone(pipe: Connection) -> None:
    """Say that a stop can be asked for, then which signal has asked."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopRequest() as stop:
        pipe.send("ready")
        while not stop.on_any_rank():
            time.sleep(0.01)
        pipe.send(stop.name)
        time.sleep(30)


@pytest.fixture
def alone():
    """A process of its own that is ready, and what it says: which signal it was sent."""
    start_forkserver()
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=_be_alone, args=(there,), daemon=True)
    process.start()
    assert here.recv() == "ready"
    yield process, here
    process.kill()
    process.join()


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)]
)
def test_only_a_later_signal_ends_the_process(alone, first, second):
    process, answers = alone
    os.kill(process.pid, first)
    assert answers.recv() == first.name
    os.kill(process.pid, first)  # torchrun's copy of what the terminal has sent
    time.sleep(2.1)
    assert process.is_alive()
    os.kill(process.pid, second)
    process.join(5)
    assert process.exitcode == -second


def test_a_warning_before_the_end_is_no_first_signal(alone):
    """A batch system sends SIGUSR1, and SIGTERM when the time is up: the save must not be cut."""
    process, answers = alone
    os.kill(process.pid, signal.SIGUSR1)
    assert answers.recv() == "SIGUSR1"
    time.sleep(2.1)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.kill(process.pid, number)
        time.sleep(0.2)
        assert process.is_alive()
    time.sleep(2.1)
    os.kill(process.pid, signal.SIGTERM)
    process.join(5)
    assert process.exitcode == -signal.SIGTERM


def test_a_warning_while_the_run_starts_up():
    before = signal.getsignal(signal.SIGUSR1)
    try:
        remember_early_signals()
        os.kill(os.getpid(), signal.SIGUSR1)
        with StopRequest() as stop:
            assert stop.on_any_rank()
            assert stop.name == "SIGUSR1"
        with StopRequest() as stop:
            assert not stop.on_any_rank()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_handlers_are_as_before():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest() as stop:
        assert not stop.on_any_rank()
        assert stop.name == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.on_any_rank()
        assert stop.name == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) != before[1]
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize(
    ("micro_step_s", "of_the_slowest_s", "asks"),
    [
        (0.1, 0.1, [0, 1, 16, 32]),
        (0.1, 0.5, [0, 1, 6, 11, 16, 21, 26, 31, 32]),
        (3.0, 3.0, range(33)),
    ],
)
def test_ranks_agree_before_a_step_and_in_a_long_one_every_two_seconds(
    micro_step_s, of_the_slowest_s, asks, monkeypatch
):
    """By the pace of the slowest rank, so that all leave out the same exchanges."""
    now_s, agreed_on = [1000.0], []

    def max_over_ranks(number):
        agreed_on.append(number)
        other = int(1000 * of_the_slowest_s) if len(agreed_on) > 1 else 0
        return max(number, other)

    monkeypatch.setattr(interruption, "max_over_ranks", max_over_ranks)
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now_s[0])
    asked, stop = [], StopRequest()
    now_s[0] += 60.0  # loading, and the first step compiles
    for micro_step in range(33):
        before = len(agreed_on)
        assert not stop.on_any_rank(is_step_start=micro_step % 16 == 0)
        asked += [micro_step] * (len(agreed_on) - before)
        now_s[0] += micro_step_s
    assert asked == list(asks)


def _stop_at(rank: int, asked_rank: int, is_during_exchange: bool) -> tuple[int, str]:
    """Continue until all agree; one rank is asked before or while it exchanges the third time."""
    all_reduce = dist.all_reduce

    def reduce_and_ask(*arguments, **options):
        all_reduce(*arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)

    with StopRequest() as stop:
        for micro_step in range(1, 10):
            asks = micro_step == 3 and rank == asked_rank
            if asks and not is_during_exchange:
                os.kill(os.getpid(), signal.SIGINT)
            dist.all_reduce = reduce_and_ask if asks and is_during_exchange else all_reduce
            if stop.on_any_rank():
                # Too early after the first, or the first one here: no reason to die.
                os.kill(os.getpid(), signal.SIGTERM)
                return micro_step, stop.name
    return 0, ""


@pytest.mark.parametrize("asked_rank", [0, 1])
@pytest.mark.parametrize("is_during_exchange", [False, True])
def test_all_stop_at_the_same_micro_step(ranks2, asked_rank, is_during_exchange):
    """A signal during the third exchange counts in the fourth, since the others cannot know it."""
    answers = ranks2.run(_stop_at, asked_rank, is_during_exchange)
    assert answers == [(4 if is_during_exchange else 3, "SIGINT")] * 2
