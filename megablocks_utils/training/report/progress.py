"""Progress on rank 0: a live bar on a terminal, a plain line every few seconds elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megablocks_utils.byte_units import GIB
from megablocks_utils.training.report.metrics import StepMetrics

__all__ = [
    "Advance",
    "TrainingView",
    "track_loading",
    "track_sharding",
    "track_tokenizing",
    "track_training",
]

PLAIN_INTERVAL_S = 5.0
_MANY_RECORDS = 10_000  # seconds of tokenizing

Advance = Callable[[int], None]
_Report = Callable[[int, str], None]  # how much is done, and a remark


def track_loading(
    console: Console, total: int, unit: str = "bytes"
) -> AbstractContextManager[Advance]:
    """Show how much of the weights is read; call the yielded function with each amount read.

    Args:
        console: Rank 0's console, or another rank's quiet one, on which nothing is shown.
        total: How much there is to read.
        unit: "bytes" (shown in GiB), or what is counted: "tensors".
    """
    describe = _describe_bytes if unit == "bytes" else _describe_count(unit)
    return _track_amount(console, "loading", total, describe)


def track_sharding(console: Console, num_layers: int) -> AbstractContextManager[Advance]:
    """Show how many layers are sharded; call the yielded function with the layers just done."""
    return _track_amount(console, "sharding", num_layers, _describe_count("layers"))


def track_tokenizing(console: Console, num_records: int) -> AbstractContextManager[Advance]:
    """Show how many records are tokenized; call the yielded function with those just done.

    Nothing of few: where a run is refused right after, its sentence stands alone.
    """
    if num_records < _MANY_RECORDS:
        return nullcontext(lambda _amount: None)
    return _track_amount(console, "tokenizing", num_records, _describe_count("records"))


@contextmanager
def track_training(
    console: Console, num_steps: int, first_step: int = 0
) -> Iterator["TrainingView"]:
    """Show step, loss, speed and time left; call what is yielded with each step's metrics.

    Args:
        console: Rank 0's console, or another rank's quiet one, on which nothing is shown.
        num_steps: The run's last step.
        first_step: Steps done before this run began, when it resumes from a checkpoint.
    """
    with _track(console, "training", num_steps, first_step, _describe_count("steps")) as report:
        yield TrainingView(report)


class TrainingView:
    """Show one line of a step, with the last evaluation and the last measured load.

    Args:
        report: shows how much is done, and a remark.
    """

    def __init__(self, report: _Report) -> None:
        self._report = report
        self._step = 0
        self._now: list[str] = []
        self._last: dict[str, str] = {}

    def __call__(self, metrics: StepMetrics) -> None:
        """Show a step that is over."""
        self._step = metrics.step
        self._now = [f"loss {metrics.loss:.4f}", f"{metrics.tokens_per_s:,.0f} tokens/s"]
        if metrics.mfu is not None:
            self._now.append(f"mfu {metrics.mfu:.1%}")
        if metrics.moe_load_max_over_mean is not None:
            self._last["load"] = f"expert load {metrics.moe_load_max_over_mean:.2f}x"
        self._show()

    def evaluated(self, loss: float) -> None:
        """Show the loss on held-out examples."""
        self._last["eval"] = f"held-out loss {loss:.4f}"
        if self._now:
            self._show()

    def _show(self) -> None:
        self._report(self._step, ", ".join([*self._now, *self._last.values()]))


@contextmanager
def _track_amount(
    console: Console, label: str, total: int, describe: Callable[[int, int], str]
) -> Iterator[Advance]:
    done = 0
    with _track(console, label, total, 0, describe) as report:

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            report(done, "")

        yield advance


@contextmanager
def _track(
    console: Console, label: str, total: int, done: int, describe: Callable[[int, int], str]
) -> Iterator[_Report]:
    """Yield the function that shows progress in the way this console can."""
    if console.quiet:
        yield lambda done, remark: None
    elif console.is_interactive:
        with _build_bar(console) as bar:
            task = bar.add_task(label, total=total, completed=done, count="", remark="")
            yield lambda done, remark: bar.update(
                task, completed=done, count=describe(done, total), remark=remark
            )
    else:
        yield PlainProgress(console, label, total, done, describe).report


def _build_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[remark]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        refresh_per_second=2,
    )


class PlainProgress:
    """Write progress as whole lines: the last one always, others when some seconds have passed.

    Args:
        console: Where to write.
        label: What is done.
        total: How much there is to do.
        done: How much was done before.
        describe: (done, total) in words.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        total: int,
        done: int,
        describe: Callable[[int, int], str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._label = label
        self._total = total
        self._first = done
        self._describe = describe
        self._clock = clock
        self._started_s = self._written_s = clock()
        self._is_over = False

    def report(self, done: int, remark: str) -> None:
        """Write a line if one is due."""
        now_s = self._clock()
        is_due = done >= self._total or now_s - self._written_s >= PLAIN_INTERVAL_S
        if self._is_over or not is_due:
            return
        self._written_s = now_s
        self._is_over = done >= self._total
        parts = [self._describe(done, self._total), remark, self._describe_time(done, now_s)]
        line = f"{self._label}: " + ", ".join(part for part in parts if part)
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _describe_time(self, done: int, now_s: float) -> str:
        elapsed_s = now_s - self._started_s
        if done >= self._total:
            return f"done in {format_duration(elapsed_s)}"
        remaining_s = elapsed_s * (self._total - done) / max(done - self._first, 1)
        return f"{format_duration(remaining_s)} left"


def format_duration(seconds: float) -> str:
    """Write seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def _describe_bytes(done: int, total: int) -> str:
    return f"{done / GIB:.2f}/{total / GIB:.2f} GiB"


def _describe_count(unit: str) -> Callable[[int, int], str]:
    return lambda done, total: f"{done}/{total} {unit}"
