"""The loss curve of a run as a picture."""

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from megablocks_utils.files import publish_file
from megablocks_utils.training.report.evaluations import Evaluation, read_evaluations
from megablocks_utils.training.report.metrics import StepMetrics, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["build_loss_figure", "plot_loss", "smooth"]

MIN_STEPS_TO_SMOOTH = 8
RAW_COLOUR, SMOOTH_COLOUR, TEXT_COLOUR = "#9db8d9", "#1f4e8c", "#333333"
HELD_OUT_COLOUR = "#c2571a"


def plot_loss(metrics_path: str | Path, png_path: str | Path) -> None:
    """Draw the losses of `metrics.jsonl` to a PNG. Rank 0 only.

    Steps whose loss is not finite leave a gap.

    Raises:
        OSError: The metrics cannot be read or the picture not written.
    """
    figure = build_loss_figure(read_metrics(metrics_path), read_evaluations(metrics_path))
    with publish_file(png_path) as temporary:
        figure.savefig(temporary, format="png")


def build_loss_figure(
    metrics: Sequence[StepMetrics], evaluations: Sequence[Evaluation] = ()
) -> "Figure":
    """Build the figure: one line labelled "each step" and, given enough steps, a smoothed one.

    Args:
        metrics: Steps in ascending order; their losses are in nats per label token.
        evaluations: Of the held-out examples, likewise; they give a line of their own.
    """
    from matplotlib.figure import Figure  # slow to import, and only rank 0 draws
    from matplotlib.ticker import MaxNLocator

    steps, losses = [m.step for m in metrics], [m.loss for m in metrics]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    is_smoothed = len(steps) >= MIN_STEPS_TO_SMOOTH
    raw_colour = RAW_COLOUR if is_smoothed else SMOOTH_COLOUR
    marker = "o" if len(steps) <= 60 else None
    axes.plot(
        steps, losses, color=raw_colour, linewidth=1.2, marker=marker, ms=3, label="each step"
    )
    if is_smoothed:
        window = choose_window(len(steps))
        label = f"mean over {window} steps"
        axes.plot(steps, smooth(losses, window), color=SMOOTH_COLOUR, linewidth=2.2, label=label)
    if evaluations:
        places = [e.step for e in evaluations], [e.eval_loss for e in evaluations]
        axes.plot(*places, color=HELD_OUT_COLOUR, linewidth=1.8, marker="D", ms=4, label="held out")
    if is_smoothed or evaluations:
        axes.legend(frameon=False, labelcolor=TEXT_COLOUR)
    axes.set_title(describe_fall(losses), loc="left", color=TEXT_COLOUR)
    axes.set_xlabel("optimizer step", color=TEXT_COLOUR)
    axes.set_ylabel("loss (nats per label token)", color=TEXT_COLOUR)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def choose_window(num_steps: int) -> int:
    """Choose the odd number of steps to average over: about a tenth of the run, 3 at least."""
    return max(3, num_steps // 10 | 1)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Average each value with its neighbours, `window` values in all and fewer at both ends.

    The window stays centred, so the line does not lag behind the values. Values that are not
    finite are left out; a window without a finite one gives NaN.
    """
    sums = [0.0, *accumulate(v if math.isfinite(v) else 0.0 for v in values)]
    counts = [0, *accumulate(int(math.isfinite(v)) for v in values)]
    reach = window // 2
    smoothed = []
    for i in range(len(values)):
        start, stop = max(0, i - reach), min(len(values), i + reach + 1)
        num_finite = counts[stop] - counts[start]
        smoothed.append((sums[stop] - sums[start]) / num_finite if num_finite else math.nan)
    return smoothed


def describe_fall(losses: Sequence[float]) -> str:
    """Describe how far the loss fell, as the figure's title."""
    if len(losses) < 2:
        return "Training loss"
    return f"Training loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last"
