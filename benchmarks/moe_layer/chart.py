"""The bar chart of the layer benchmark."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness.outcome import MEASURED
from benchmarks.moe_layer.cases import MODES
from benchmarks.moe_layer.contenders import OURS, TITLES

_OURS_COLOR = "black"
_WIDTH = 0.8


def draw_chart(content: dict[str, Any], path: Path) -> None:
    """Draw rates of forward and backward, even routing: a panel a shape, a group a mode."""
    rows = [row for row in content["rows"] if row["case"]["routing"] == "uniform"]
    measured = [row for row in rows if row["status"] == MEASURED]
    shapes = list(dict.fromkeys(row["case"]["name"] for row in measured))
    figure = Figure(figsize=(4 * len(shapes), 4.2), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False)[0]
    for panel, shape in zip(panels, shapes, strict=True):
        _draw_panel(panel, shape, [row for row in measured if row["case"]["name"] == shape])
    panels[0].set_ylabel("useful TFLOP/s, forward and backward")
    handles = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"One MoE layer on {content['device']['name']}", fontsize=11)
    FigureCanvasAgg(figure).print_png(path)


def _draw_panel(panel: Axes, shape: str, rows: list[dict[str, Any]]) -> None:
    modes = [mode.name for mode in MODES if any(r["case"]["mode"] == mode.name for r in rows)]
    names = [name for name in TITLES if any(row["side"] == name for row in rows)]
    width = _WIDTH / len(names)
    for place, name in enumerate(names):
        rates = {
            row["case"]["mode"]: row["derived"]["forward_backward"]["tflops"]
            for row in rows
            if row["side"] == name
        }
        left = [modes.index(mode) - _WIDTH / 2 + (place + 0.5) * width for mode in rates]
        color = _OURS_COLOR if name == OURS else f"C{list(TITLES).index(name)}"
        panel.bar(left, list(rates.values()), width, label=TITLES[name], color=color)
    panel.set_xticks(range(len(modes)), modes)
    panel.set_title(f"{shape}, {rows[0]['case']['tokens']} tokens", fontsize=10)
