"""The plot of a table: time and memory of every row."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness.outcome import NOT_MEASURED
from benchmarks.table.bench import CARD_BYTES
from benchmarks.table.markdown import predicted_bytes, shown_rows
from benchmarks.table.options import CPU
from megablocks_utils.files import publish_file

# Okabe and Ito's colours, distinguishable with colour blindness; marks differ too.
_PUBLISHED, _PREDICTED, _MEASURED = "#999999", "#E69F00", "#0072B2"
_GROUP_COLOURS = {"published": "#0072B2", "ours": "#009E73", "transformers": "#D55E00"}
_GROUP_LABELS = {
    "published": "rows of the published table",
    "ours": "ours",
    "transformers": "transformers' own",
}
_GB, _MB = 10**9, 10**6
_GREY = "#555555"


def draw_chart(content: Mapping[str, Any], path: Path) -> None:
    """Draw the plot to a PNG."""
    figure = build_figure(content)
    FigureCanvasAgg(figure)
    with publish_file(path) as temporary:
        figure.savefig(temporary, format="png")


def build_figure(content: Mapping[str, Any]) -> Figure:
    """Draw a line of the table as a line of each panel: time, if it was measured, and memory."""
    rows = shown_rows(content)
    is_timed = any((row.get("measured") or {}).get("micro_step_s") for row in rows)
    height = 1.6 + 0.36 * len(rows)
    figure = Figure(figsize=(13 if is_timed else 9, height), dpi=130, layout="constrained")
    panels = figure.subplots(1, 2 if is_timed else 1, sharey=True, squeeze=False)[0]
    if is_timed:
        _draw_time(panels[0], rows, has_published=content["is_published"])
    _draw_memory(panels[-1], content)
    panels[0].set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=8)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    for panel in panels:
        panel.set_xlim(left=0)
        panel.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(_describe(content), fontsize=10)
    return figure


def _describe(content: Mapping[str, Any]) -> str:
    bench, gpus = content["bench"], content["hardware"]["gpus"]
    what = {"plan": "predicted", "one_gpu": "one GPU, fake peers"}.get(
        content["mode"], gpus[0] if gpus else "CPU ranks"
    )
    return (
        f"{bench['config']['num_hidden_layers']}-layer {bench['config']['model_type']}, "
        f"{bench['ranks']} ranks, {bench['tokens']} tokens a rank, {bench['precision']}: {what}"
    )


def _draw_time(panel: Axes, rows: Sequence[Mapping[str, Any]], *, has_published: bool) -> None:
    labelled = set()
    for place, row in enumerate(rows):
        times = (row.get("measured") or {}).get("micro_step_s")
        if times is None:
            _write(panel, place, row["status"])
            continue
        group = row["side"]
        label = None if group in labelled else _GROUP_LABELS[group]
        labelled.add(group)
        middle = times["median"]
        reach = [[middle - times["min"]], [times["max"] - middle]]
        panel.barh(place, middle, 0.6, color=_GROUP_COLOURS[group], label=label)
        panel.errorbar(middle, place, xerr=reach, color="black", capsize=3, linewidth=1)
    if has_published:
        pairs = [
            (row["published"]["micro_step_s"], place)
            for place, row in enumerate(rows)
            if row["published"] and not row["published"]["is_oom"]
        ]
        if pairs:
            seconds, places = zip(*pairs, strict=True)
            panel.plot(seconds, places, "|", color="black", ms=14, label="published (inferred)")
    panel.set_xlabel("seconds of a micro-step (median, least to largest)")


def _draw_memory(panel: Axes, content: Mapping[str, Any]) -> None:
    unit, word = (_MB, "MB, process included") if content["mode"] == CPU else (_GB, "GB")
    rows = shown_rows(content)
    series: dict[str, tuple[Callable[..., float | None] | None, str, str]] = {
        "published": (_published if content["is_published"] else None, _PUBLISHED, "s"),
        "predicted": (_predicted, _PREDICTED, "D"),
        "measured": (_measured, _MEASURED, "o"),
    }
    for name, (read, colour, mark) in series.items():
        found = [(place, read(row)) for place, row in enumerate(rows) if read and read(row)]
        if not found:
            continue
        places, numbers = zip(*found, strict=True)
        sizes = [number / unit for number in numbers]
        panel.plot(sizes, places, mark, color=colour, ms=8, label=name, markeredgecolor="black")
    if any(row["predicted"] and row["predicted"]["is_oom"] for row in rows):
        panel.axvline(CARD_BYTES / unit, color=_GREY, linestyle="--", label="the published card")
    for place, row in enumerate(rows):
        words = [row["status"]] if row["status"] != NOT_MEASURED and not _measured(row) else []
        if content["is_published"] and (row["published"] or {}).get("is_oom"):
            words.append("published: OOM")
        _write(panel, place, ", ".join(words))
    panel.set_xlabel(f"peak memory of the fullest rank, {word}")


def _write(panel: Axes, place: int, word: str) -> None:
    panel.annotate(
        word,
        (0, place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=_GREY,
    )


def _published(row: Mapping[str, Any]) -> float | None:
    return (row["published"] or {}).get("peak_bytes")


def _predicted(row: Mapping[str, Any]) -> float | None:
    return predicted_bytes(row, "peak")


def _measured(row: Mapping[str, Any]) -> float | None:
    return (row.get("measured") or {}).get("peak_bytes")
