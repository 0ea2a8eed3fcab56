"""Progress: lines in a log, a bar on a terminal, nothing on other ranks."""

import io
import re

import pytest
from rich.console import Console

from megablocks_utils.training.report import progress as progress_module
from megablocks_utils.training.report.progress import (
    PlainProgress,
    format_duration,
    track_loading,
    track_sharding,
    track_training,
)
from tests.training.report.test_metrics import build_metrics

GIB = 1024**3


class Clock:
    """Show the seconds it is told."""

    now_s = 0.0

    def __call__(self):
        return self.now_s


def build_text_console(**options):
    return Console(file=io.StringIO(), width=80, **options)


def test_plain_lines_come_every_few_seconds_and_at_the_end():
    clock, console = Clock(), build_text_console()
    plain = PlainProgress(console, "training", 40, 10, "{}/{} steps".format, clock=clock)
    for step in range(11, 41):
        clock.now_s += 2
        plain.report(step, f"loss {step}")
    plain.report(40, "again")
    assert console.file.getvalue().splitlines() == [
        "training: 13/40 steps, loss 13, 0:00:54 left",
        "training: 16/40 steps, loss 16, 0:00:48 left",
        "training: 19/40 steps, loss 19, 0:00:42 left",
        "training: 22/40 steps, loss 22, 0:00:36 left",
        "training: 25/40 steps, loss 25, 0:00:30 left",
        "training: 28/40 steps, loss 28, 0:00:24 left",
        "training: 31/40 steps, loss 31, 0:00:18 left",
        "training: 34/40 steps, loss 34, 0:00:12 left",
        "training: 37/40 steps, loss 37, 0:00:06 left",
        "training: 40/40 steps, loss 40, done in 0:01:00",
    ]


@pytest.fixture
def every_line(monkeypatch):
    monkeypatch.setattr(progress_module, "PLAIN_INTERVAL_S", 0.0)
    monkeypatch.setattr(PlainProgress, "_describe_time", lambda self, done, now_s: "")


@pytest.mark.usefixtures("every_line")
class TestLinesInALog:
    def test_loading_in_bytes(self):
        console = build_text_console()
        with track_loading(console, 4 * GIB) as advance:
            advance(GIB)
            advance(3 * GIB)
        assert console.file.getvalue() == "loading: 1.00/4.00 GiB\nloading: 4.00/4.00 GiB\n"

    def test_loading_in_tensors(self):
        console = build_text_console()
        with track_loading(console, 3, unit="tensors") as advance:
            advance(1)
            advance(2)
        assert console.file.getvalue() == "loading: 1/3 tensors\nloading: 3/3 tensors\n"

    def test_sharding(self):
        console = build_text_console()
        with track_sharding(console, 2) as advance:
            advance(1)
            advance(1)
        assert console.file.getvalue() == "sharding: 1/2 layers\nsharding: 2/2 layers\n"

    def test_training(self):
        console = build_text_console()
        with track_training(console, 4, first_step=2) as update:
            update.evaluated(2.0)
            update(build_metrics(3, 1.5, tokens_per_s=1234.5, moe_load_max_over_mean=1.5))
            update(build_metrics(4, 1.25, tokens_per_s=2000.0, mfu=0.314))
        last = "held-out loss 2.0000, expert load 1.50x\n"  # those of the last steps that have one
        assert console.file.getvalue() == (
            f"training: 3/4 steps, loss 1.5000, 1,234 tokens/s, {last}"
            f"training: 4/4 steps, loss 1.2500, 2,000 tokens/s, mfu 31.4%, {last}"
        )


def test_a_failure_passes_through_without_a_last_line():
    console = build_text_console()
    with pytest.raises(RuntimeError, match="^boom$"), track_sharding(console, 2) as advance:
        advance(1)
        raise RuntimeError("boom")
    assert console.file.getvalue() == ""


@pytest.mark.parametrize("kind", [{}, {"force_terminal": True, "force_interactive": True}])
def test_other_ranks_show_nothing(kind):
    console = build_text_console(quiet=True, **kind)
    with track_training(console, 1) as update, track_loading(console, 1) as advance:
        update(build_metrics(1))
        advance(1)
    assert console.file.getvalue() == ""


def test_a_terminal_gets_a_bar_that_ends_full():
    console = build_text_console(force_terminal=True, force_interactive=True, color_system=None)
    with track_training(console, 2) as update:
        update(build_metrics(1, 1.5))
        update(build_metrics(2, 1.25, tokens_per_s=2000.0))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    last = [line for line in re.split(r"[\r\n]+", shown) if line][-1].rstrip()
    assert re.fullmatch(r"training ━{24} 2/2 steps loss 1\.2500, 2,000 tokens/s 00:00", last), last


def test_durations():
    assert [format_duration(s) for s in (0.4, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]
