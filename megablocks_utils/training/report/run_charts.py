"""The charts of a run's report, as SVG that lies in the page and takes its colours. Torch-free."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "draw_curves", "draw_heatmap"]

MAX_POINTS = 600
"""Points of a curve; of a longer one each is the mean of several steps."""
COLOURS = ("#3b82c4", "#d97706", "#2f9e6e")
"""Readable on a light and on a dark page."""
_TEXT = "#010203"
_GRID = "#8a8a8a"


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        label: in the legend.
        points: (step, value); one that is not finite leaves a gap.
        has_marks: whether each point is marked.
    """

    label: str
    points: Sequence[tuple[float, float]]
    has_marks: bool = False


def draw_curves(title: str, unit: str, curves: Sequence[Curve]) -> str:
    """Draw curves over the steps."""
    figure, axes = _start(title)
    for colour, curve in zip(COLOURS, curves, strict=False):
        points = thin_out(curve.points)
        marker = "o" if curve.has_marks or len(points) <= 40 else None
        steps, values = [x for x, _ in points], [y for _, y in points]
        axes.plot(steps, values, color=colour, lw=1.4, marker=marker, ms=3, label=curve.label)
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=_TEXT, fontsize=8)
    axes.set_xlabel("optimizer step", color=_TEXT, fontsize=9)
    axes.set_ylabel(unit, color=_TEXT, fontsize=9)
    axes.grid(axis="y", color=_GRID, alpha=0.25, lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return _as_svg(figure)


def draw_heatmap(title: str, rows: Sequence[Sequence[float]]) -> str:
    """Draw the load of every expert: one row a layer, 1 is even."""
    figure, axes = _start(title, height=1.6 + min(3.5, 0.18 * len(rows)))
    width = max(len(row) for row in rows)
    filled = [[*row, *[math.nan] * (width - len(row))] for row in rows]
    highest = max(2.0, *(load for row in rows for load in row))
    image = axes.imshow(
        filled, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=highest
    )
    bar = figure.colorbar(image, ax=axes)
    bar.ax.tick_params(colors=_TEXT, labelsize=8)
    bar.outline.set_edgecolor(_GRID)
    axes.set_xlabel("expert", color=_TEXT, fontsize=9)
    axes.set_ylabel("MoE layer", color=_TEXT, fontsize=9)
    _keep_whole(axes)
    return _as_svg(figure)


def thin_out(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `MAX_POINTS` points, each the mean of neighbours."""
    size = -(-len(points) // MAX_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _start(title: str, height: float = 2.7) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes: Any = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_title(title, loc="left", color=_TEXT, fontsize=10)
    axes.tick_params(colors=_TEXT, labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(_GRID)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure, axes


def _keep_whole(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _as_svg(figure: "Figure") -> str:
    """Return the element alone: without prolog and metadata, which name addresses of others."""
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text)
    return text.replace("xlink:href", "href").replace(_TEXT, "currentColor").strip()
