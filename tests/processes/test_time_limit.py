"""When a run stops for its time limit: early enough to save, and no earlier."""

import os
import subprocess
import sys
import time

import pytest

from megablocks_utils.processes import time_limit
from megablocks_utils.processes.time_limit import TimeLimit


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""

    class Clock:
        now_s = 1000.0

        def monotonic(self):
            return self.now_s

        def step(self, limit, micro_steps_s):
            """Do a step; return whether it was begun, and whether it was left to its end."""
            for number, seconds in enumerate(micro_steps_s):
                if limit.is_nearly_up():
                    return number
                self.now_s += seconds
            limit.end_step()
            return None

    clock = Clock()
    monkeypatch.setattr(time_limit, "time", clock)
    return clock


def test_a_step_that_would_not_fit_is_not_begun(clock):
    limit = TimeLimit("100s", age_s=0.0)
    limit.add_save(20.0)
    # 5 s of margin and 20 s for the save leave 75: seven steps of ten seconds.
    done = [clock.step(limit, [5.0, 5.0]) for _ in range(8)]
    assert done == [None] * 7 + [0]


def test_a_step_that_takes_longer_is_left(clock):
    limit = TimeLimit("100s", age_s=0.0)
    assert clock.step(limit, [1.0] * 10) is None
    assert clock.step(limit, [1.0] + [30.0] * 10) == 3


def test_the_first_save_is_guessed_from_its_size(clock):
    limit = TimeLimit("100s", age_s=0.0)
    limit.expect_save(16 * 10**9)
    assert not limit.is_nearly_up()
    assert limit.is_nearly_up(num_saves=2)
    limit.add_save(1.0)
    assert not limit.is_nearly_up(num_saves=2)


def test_the_time_before_counts(clock):
    assert not TimeLimit("100s", age_s=90.0).is_nearly_up()
    assert TimeLimit("100s", age_s=95.0).is_nearly_up()


def test_the_clock_starts_with_the_launcher():
    code = (
        "import time, megablocks_utils.processes.time_limit as t; "
        "print(t._read_age_s(), t._read_process_age_s(t.os.getpid()))"
    )
    started_s = time.monotonic()
    for environ, is_parents in (({}, False), ({"TORCHELASTIC_RUN_ID": "x"}, True)):
        answer = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | environ,
            capture_output=True,
            text=True,
            check=True,
        )
        age, own = map(float, answer.stdout.split())
        assert 0 <= own <= time.monotonic() - started_s + 1
        assert (age - own > 0.1) == is_parents
