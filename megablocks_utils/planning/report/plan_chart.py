"""The plan as a picture: a stacked bar for every layout, against the memory that there is."""

import operator
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megablocks_utils.byte_units import GB, GIB
from megablocks_utils.files import publish_file
from megablocks_utils.planning.memory.verdict import WORDS
from megablocks_utils.planning.model.prediction import COMPONENTS
from megablocks_utils.planning.speed.layout_plan import PlanRequest, PlanRow, choose_row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "build_plan_figure", "draw_plan"]

COLOURS = dict(
    zip(
        COMPONENTS,
        ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"),
        strict=True,
    )
)
"""Okabe and Ito's, which people with any colour vision tell apart."""
TEXT_COLOUR, _FAINT, _RESERVE = "#333333", "#e6e6e6", "#999999"
_MARKS = {"fits": "✓ fits", "tight": "! tight", "oom": "✗ OOM"}
_BAR, _ROW_INCHES, _FRAME_INCHES = 0.62, 0.42, 2.1


def draw_plan(request: PlanRequest, rows: Sequence[PlanRow], path: str | Path) -> None:
    """Draw the plan to a PNG, complete or not at all.

    Raises:
        OSError: the picture cannot be written.
    """
    figure = build_plan_figure(request, rows)
    with publish_file(path) as temporary:
        figure.savefig(temporary, format="png")


def build_plan_figure(request: PlanRequest, rows: Sequence[PlanRow]) -> "Figure":
    """Build the figure; the first row is on top, and beside each bar is its verdict."""
    from matplotlib.figure import Figure

    height = _FRAME_INCHES + _ROW_INCHES * len(rows)
    figure = Figure(figsize=(10, height), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    capacity = request.capacity_bytes / GB
    longest = max(row.prediction.peak_bytes + row.verdict.reserve_bytes for row in rows) / GB
    limit = 1.22 * max(capacity, min(longest, 3 * capacity))
    _draw_bars(axes, rows)
    _draw_verdicts(axes, rows, capacity, limit)
    axes.axvline(capacity, color=TEXT_COLOUR, linewidth=1.4, linestyle=(0, (4, 2)), zorder=3)
    axes.annotate(
        f"a GPU has {capacity:.1f} GB",
        (capacity, -0.75),
        xytext=(4, 0),
        textcoords="offset points",
        color=TEXT_COLOUR,
        fontsize=8.5,
        va="center",
    )
    axes.set_xlim(0, limit)
    axes.set_ylim(len(rows) - 0.5, -1.1)
    _dress(figure, axes, request, rows)
    return figure


def _draw_bars(axes: "Axes", rows: Sequence[PlanRow]) -> None:
    places, left = range(len(rows)), [0.0] * len(rows)
    for name in COMPONENTS:
        sizes = [row.prediction.components[name] / GB for row in rows]
        axes.barh(
            places,
            sizes,
            _BAR,
            left=left,
            label=WORDS[name],
            color=COLOURS[name],
            edgecolor="white",
            linewidth=0.6,
            zorder=2,
        )
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    reserve = [row.verdict.reserve_bytes / GB for row in rows]
    axes.barh(
        places,
        reserve,
        _BAR,
        left=left,
        label="reserve",
        facecolor="white",
        edgecolor=_RESERVE,
        hatch="////",
        linewidth=0.6,
        zorder=2,
    )


def _draw_verdicts(axes: "Axes", rows: Sequence[PlanRow], capacity: float, limit: float) -> None:
    chosen = choose_row(rows)
    for place, row in enumerate(rows):
        end = (row.prediction.peak_bytes + row.verdict.reserve_bytes) / GB
        words = f"{_MARKS[row.verdict.name]}  {row.prediction.peak_bytes / GB:.1f} GB"
        is_outside = end > 0.86 * limit
        if end < capacity < end + 0.15 * limit:
            end = capacity  # not across the line
        axes.annotate(
            words,
            (limit if is_outside else end, place),
            xytext=(-5 if is_outside else 5, 0),
            textcoords="offset points",
            ha="right" if is_outside else "left",
            va="center",
            color=TEXT_COLOUR,
            fontsize=9,
            fontweight="bold" if row is chosen else "normal",
            zorder=4,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
        )


def _dress(figure: "Figure", axes: "Axes", request: PlanRequest, rows: Sequence[PlanRow]) -> None:
    chosen = choose_row(rows)
    labels = [_label(row) for row in rows]
    axes.set_yticks(range(len(rows)), labels, color=TEXT_COLOUR, fontsize=9)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row is chosen else "normal")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=TEXT_COLOUR, labelsize=8.5)
    axes.set_xlabel("GB of the fullest rank (1 GB = 10⁹ bytes)", color=TEXT_COLOUR, fontsize=9)
    axes.grid(axis="x", color=_FAINT, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    to_gib, to_gb = partial(operator.mul, GB / GIB), partial(operator.mul, GIB / GB)
    twin = axes.secondary_xaxis("top", functions=(to_gib, to_gb))
    twin.tick_params(colors=_RESERVE, labelsize=8)
    twin.set_xlabel("GiB", color=_RESERVE, fontsize=8.5)
    twin.spines["top"].set_visible(False)
    figure.legend(
        loc="outside lower center", ncols=7, frameon=False, fontsize=8.5, labelcolor=TEXT_COLOUR
    )
    run, scenario = request.scenario.planned_run(), request.scenario
    trained = "all weights" if run.use_lora == "none" else f"LoRA {run.use_lora}"
    figure.suptitle(
        f"{request.model} on {scenario.world_size} GPUs: {trained}, {run.precision.name}, "
        f"{scenario.rank_tokens:,} tokens a rank",
        color=TEXT_COLOUR,
        fontsize=11,
        x=0.01,
        ha="left",
    )


def _label(row: PlanRow) -> str:
    if row.layout.ep_size == 1:
        return "no expert parallelism"
    return f"ep {row.layout.ep_size}, {row.layout.expert_dp}"
