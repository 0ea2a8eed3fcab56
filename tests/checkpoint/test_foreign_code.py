"""Templates and tokenizers of others: whatever they do ends in one sentence."""

import contextlib
import signal
import threading
import time

import pytest

from megablocks_utils.checkpoint.foreign_code import ForeignCode, MemoryLimit
from megablocks_utils.errors import CheckpointError, DataError


class PanicException(BaseException):
    """Named as what tokenizers raise when Rust code panics."""


def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (Exception("data did not\n match"), "bad: data did not match"),
        (KeyError("role"), "bad: 'role' (KeyError)"),
        (RecursionError(), "bad: RecursionError"),
        (MemoryError(), "bad: it needs too much memory"),
        (PanicException("index out of range"), "bad: index out of range"),
        (ValueError("x" * 999), "bad: " + "x" * 300),
    ],
)
def test_any_failure_is_an_error_for_the_user(error, sentence):
    with (
        pytest.raises(CheckpointError) as caught,
        ForeignCode(lambda r: CheckpointError(f"bad: {r}")),
    ):
        raise error
    assert str(caught.value) == sentence
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [DataError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_errors_for_the_user_and_requests_to_stop_pass(error):
    with pytest.raises(type(error)) as caught, ForeignCode(CheckpointError):
        raise error
    assert caught.value is error


def test_a_time_limit_ends_code_that_catches_everything_and_leaves_other_alarms():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.6)
        started_s = time.monotonic()
        too_slow = pytest.raises(DataError, match="^it takes more than 0.2 s$")
        with too_slow, ForeignCode(DataError, limit_s=0.2):
            while True:
                with contextlib.suppress(Exception):  # as code of others may
                    spin(9)
        assert time.monotonic() - started_s < 0.5
        spin(0.6)
        assert len(rung) == 1 and 0.5 < rung[0] - started_s < 0.9
        with ForeignCode(DataError, limit_s=0.1):
            pass
        spin(0.2)
        assert len(rung) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_another_thread_runs_without_a_limit():
    failed = []

    def run():
        with ForeignCode(DataError, limit_s=0.01):
            spin(0.05)
        failed.append(False)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failed == [False]


def test_a_memory_limit_holds_within_and_not_after():
    size = 512 * 1024**2
    with pytest.raises(MemoryError), MemoryLimit(size // 4):
        bytearray(size)
    assert len(bytearray(size)) == size


def test_limits_cost_next_to_nothing():
    started_s = time.perf_counter()
    for _ in range(1000):
        with ForeignCode(DataError, limit_s=10):
            pass
    assert (time.perf_counter() - started_s) / 1000 < 100e-6
