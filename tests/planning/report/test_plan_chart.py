"""The pictures show the plan's own numbers."""

import math
from dataclasses import replace

import pytest

from megablocks_utils.byte_units import GB
from megablocks_utils.planning.model.prediction import COMPONENTS
from megablocks_utils.planning.report.plan_chart import COLOURS, build_plan_figure, draw_plan
from megablocks_utils.planning.report.scale_chart import build_scale_figure
from megablocks_utils.planning.speed.layout_plan import PlanRequest, choose_row, plan_layouts
from megablocks_utils.planning.speed.scale import plan_scale
from tests.planning.cases import A100_NODE, build_scenario

CAPACITY = 85 * GB


@pytest.fixture
def plan_request():
    return PlanRequest("m", "m", build_scenario(), A100_NODE, CAPACITY)


def test_every_bar_is_a_row(plan_request):
    rows = plan_layouts(plan_request)
    figure = build_plan_figure(plan_request, rows)
    axes = figure.axes[0]
    bars = {bar.get_label(): bar for bar in axes.containers}
    below = [0] * len(rows)
    for name, bar in zip(COMPONENTS, bars.values(), strict=False):
        widths = [patch.get_width() for patch in bar]
        assert [width * GB for width in widths] == pytest.approx(
            [row.prediction.components[name] for row in rows]
        )
        starts = [patch.get_x() * GB for patch in bar]
        assert starts == pytest.approx(below)  # on what is below it
        below = [start + size * GB for start, size in zip(starts, widths, strict=True)]
        assert {patch.get_facecolor() for patch in bar} == {bar[0].get_facecolor()}
    ends = [patch.get_x() + patch.get_width() for patch in bars["reserve"]]
    peaks = [row.prediction.peak_bytes + row.verdict.reserve_bytes for row in rows]
    assert [end * GB for end in ends] == pytest.approx(peaks)
    assert len(set(COLOURS.values())) == len(COMPONENTS)


def test_the_line_is_the_capacity_and_each_verdict_stands_at_its_bar(plan_request):
    rows = plan_layouts(plan_request)
    axes = build_plan_figure(plan_request, rows).axes[0]
    assert [line.get_xdata()[0] for line in axes.lines] == [85.0]
    words = [text.get_text() for text in axes.texts]
    for place, row in enumerate(rows):
        mark = {"fits": "✓ fits", "tight": "! tight", "oom": "✗ OOM"}[row.verdict.name]
        text = next(t for t in axes.texts if t.xy[1] == place)
        assert text.get_text() == f"{mark}  {row.prediction.peak_bytes / GB:.1f} GB"
        assert (text.get_fontweight() == "bold") == (row is choose_row(rows))
    assert "a GPU has 85.0 GB" in words


def test_a_huge_row_does_not_hide_the_others(plan_request):
    """The axis ends at three capacities; the bar leaves it, and its verdict stays inside."""
    small = replace(plan_request, capacity_bytes=20 * GB)
    rows = plan_layouts(small)
    axes = build_plan_figure(small, rows).axes[0]
    limit = axes.get_xlim()[1]
    assert max(row.prediction.peak_bytes for row in rows) / GB > limit
    assert limit == pytest.approx(1.22 * 60)
    assert all(text.xy[0] <= limit for text in axes.texts)


def test_a_picture_is_complete_or_not_there(plan_request, tmp_path):
    rows = plan_layouts(plan_request)
    draw_plan(plan_request, rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
    with pytest.raises(OSError):
        draw_plan(plan_request, rows, tmp_path / "none" / "p.png")


def test_lines_over_gpus(plan_request):
    points = plan_scale(plan_request, (8, 16, 32))
    figure = build_scale_figure({"m": points}, CAPACITY)
    memory, traffic, waiting = figure.axes
    line = next(line for line in memory.lines if line.get_label() == "m")
    assert list(line.get_xdata()) == [8, 16, 32]
    peaks = [point.shown.prediction.peak_bytes for point in points]
    assert [y * GB for y in line.get_ydata()] == pytest.approx(peaks)
    sent = [point.shown.cost.inter_bytes / 16 for point in points]
    assert [y * GB for y in traffic.lines[0].get_ydata()] == pytest.approx(sent)
    assert math.isnan(waiting.lines[0].get_ydata()[0])  # one node: tokens stay in it
