"""Memory and traffic against the number of GPUs, for one model or several."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megablocks_utils.byte_units import GB
from megablocks_utils.files import publish_file
from megablocks_utils.planning.memory.verdict import OOM
from megablocks_utils.planning.report.plan_chart import TEXT_COLOUR
from megablocks_utils.planning.speed.scale import ScalePoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["build_scale_figure", "draw_scale"]

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_scale(
    series: Mapping[str, Sequence[ScalePoint]], capacity_bytes: int, path: str | Path
) -> None:
    """Draw it to a PNG, complete or not at all.

    Raises:
        OSError: the picture cannot be written.
    """
    figure = build_scale_figure(series, capacity_bytes)
    with publish_file(path) as temporary:
        figure.savefig(temporary, format="png")


def build_scale_figure(series: Mapping[str, Sequence[ScalePoint]], capacity_bytes: int) -> "Figure":
    """Build three panels: peak, bytes between nodes, and tokens against weights.

    Args:
        series: points by the name of the model.
        capacity_bytes: memory of a GPU.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), dpi=130, layout="constrained")
    memory, traffic, waiting = figure.subplots(1, 3)
    for place, (name, points) in enumerate(series.items()):
        style = {"color": _COLOURS[place % 6], "marker": _MARKERS[place % 6], "ms": 5, "lw": 1.6}
        worlds = [point.world_size for point in points]
        peaks = [point.shown.prediction.peak_bytes / GB for point in points]
        memory.plot(worlds, peaks, label=name, **style)
        misfits = [i for i, p in enumerate(points) if p.shown.verdict.name == OOM]
        memory.plot([worlds[i] for i in misfits], [peaks[i] for i in misfits], "x", **_CROSS)
        traffic.plot(worlds, [_inter_gb(point) for point in points], **style)
        waiting.plot(worlds, [_tokens_over_weights(point) for point in points], **style)
    memory.axhline(capacity_bytes / GB, color=TEXT_COLOUR, linestyle=(0, (4, 2)), linewidth=1.2)
    waiting.axhline(1, color=TEXT_COLOUR, linestyle=(0, (4, 2)), linewidth=1.2)
    _dress(memory, "Peak of the chosen layout, GB", "dashes: a GPU's memory; crosses: none fits")
    _dress(traffic, "Sent to other nodes, GB", "chosen layout, a rank and micro-step")
    _dress(
        waiting,
        "Time of all-to-all over that of weights",
        "largest ep_size; no point where tokens stay in their node",
    )
    for axes in (memory, waiting):
        _dress_log(axes)
    waiting.set_xlim(memory.get_xlim())  # also where nothing is drawn
    figure.legend(
        loc="outside lower center", ncols=6, frameon=False, labelcolor=TEXT_COLOUR, fontsize=9
    )
    return figure


_CROSS = {"color": TEXT_COLOUR, "ms": 9, "mew": 1.6}


def _inter_gb(point: ScalePoint) -> float:
    return point.shown.cost.inter_bytes / point.shown.accumulation / GB


def _tokens_over_weights(point: ScalePoint) -> float:
    """Return how much longer tokens take than weights; NaN where tokens stay in their node."""
    links = point.widest.cost.links
    weights = sum(link.ideal_s for name, link in links.items() if name != "all_to_all")
    tokens = links["all_to_all"]
    return tokens.ideal_s / weights if tokens.inter_bytes > 0 and weights else math.nan


def _dress(axes: "Axes", title: str, note: str) -> None:
    from matplotlib.ticker import NullLocator, ScalarFormatter

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(f"{title}\n", loc="left", color=TEXT_COLOUR, fontsize=10.5)
    axes.text(0, 1.02, note, transform=axes.transAxes, color="#777777", fontsize=8.5)
    axes.set_xlabel("GPUs", color=TEXT_COLOUR, fontsize=9)
    axes.tick_params(colors=TEXT_COLOUR, labelsize=8.5)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _dress_log(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
