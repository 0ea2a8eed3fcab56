"""The loss curve: what it plots, and the picture it leaves."""

import math
import struct

import numpy as np

from megablocks_utils.training.report.loss_plot import (
    build_loss_figure,
    choose_window,
    describe_fall,
    plot_loss,
    smooth,
)
from megablocks_utils.training.report.metrics import MetricsWriter, read_metrics
from tests.training.report.test_metrics import build_metrics


def series_of(figure):
    (axes,) = figure.axes
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }


def build_steps(losses):
    return [build_metrics(step, loss) for step, loss in enumerate(losses, start=1)]


def test_short_run_shows_its_steps_only():
    assert series_of(build_loss_figure(build_steps([3.0, 2.0, 1.0]))) == {
        "each step": ([1, 2, 3], [3.0, 2.0, 1.0])
    }


def test_long_run_adds_the_smoothed_line():
    steps, losses = list(range(1, 41)), [2.0 + (-1) ** i - i / 100 for i in range(40)]
    series = series_of(build_loss_figure(build_steps(losses)))
    assert list(series) == ["each step", "mean over 5 steps"]
    assert series["each step"] == (steps, losses)
    xs, ys = series["mean over 5 steps"]
    assert xs == steps
    expected = np.convolve(losses, np.ones(5) / 5, mode="valid")
    np.testing.assert_allclose(ys[2:-2], expected, rtol=1e-12)


def test_axes_say_what_they_are():
    (axes,) = build_loss_figure(build_steps([3.0, 2.5])).axes
    assert axes.get_xlabel() == "optimizer step"
    assert axes.get_ylabel() == "loss (nats per label token)"
    assert axes.get_title(loc="left") == "Training loss: 3.000 at the first step, 2.500 at the last"
    assert describe_fall([1.0]) == "Training loss"


def test_smooth_at_the_ends_and_around_missing_values():
    assert smooth([1.0, 2.0, 6.0], 3) == [1.5, 3.0, 4.0]
    assert smooth([1.0, math.nan, 3.0, math.inf], 3) == [1.0, 2.0, 3.0, 3.0]
    assert all(math.isnan(v) for v in smooth([math.nan, math.nan], 3))
    assert smooth([], 3) == []


def test_window_is_odd_and_a_tenth():
    assert [choose_window(n) for n in (8, 40, 100, 404)] == [3, 5, 11, 41]


def test_picture_is_drawn_from_the_metrics_file(tmp_path):
    losses = [math.nan if step == 5 else 2.0 / step for step in range(1, 13)]
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for metrics in build_steps(losses):
            writer.write(metrics)
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    content = (tmp_path / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (960, 540)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]

    figure = build_loss_figure(read_metrics(tmp_path / "metrics.jsonl"))
    steps, plotted = series_of(figure)["each step"]
    assert steps == list(range(1, 13))
    np.testing.assert_array_equal(plotted, losses)
    figure.savefig(tmp_path / "again.png", format="png")
    assert (tmp_path / "again.png").read_bytes() == content
