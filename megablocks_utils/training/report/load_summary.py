"""The loads of experts over a whole run: in one line, and as a picture."""

from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from megablocks_utils.files import EXPERT_LOAD_NAME, EXPERT_LOAD_PLOT_NAME, publish_file
from megablocks_utils.training.report.expert_load import LayerLoad, StepLoads, read_loads
from megablocks_utils.training.report.loss_plot import RAW_COLOUR, SMOOTH_COLOUR, TEXT_COLOUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LoadSummary", "build_load_figure", "report_loads"]


@dataclass
class LoadSummary:
    """Add up the measured steps of a run.

    Attributes:
        steps: those that were measured.
        shares: by layer, the shares of its experts summed over the steps.
        max_over_mean: in each step, rows of the busiest expert over the mean, in the worst layer.
        rank_max_over_mean: in each step, rows of the busiest rank over the mean, the layers' mean.
        worst: the layer whose busiest rank was furthest from the mean, and its step.
        num_dead: experts without a token in the last of the steps.
        num_experts: of all layers.
    """

    steps: list[int] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=dict)
    max_over_mean: list[float] = field(default_factory=list)
    rank_max_over_mean: list[float] = field(default_factory=list)
    worst: tuple[int, LayerLoad] | None = None
    num_dead: int = 0
    num_experts: int = 0

    def add(self, loads: StepLoads) -> None:
        """Add a step with at least one layer."""
        self.steps.append(loads.step)
        self.max_over_mean.append(max(layer.max_over_mean for layer in loads.layers))
        ratios = [layer.rank_max_over_mean for layer in loads.layers]
        self.rank_max_over_mean.append(sum(ratios) / len(ratios))
        for layer in loads.layers:
            sums = self.shares.get(layer.layer, [])
            pairs = zip_longest(sums, layer.share, fillvalue=0.0)
            self.shares[layer.layer] = [a + b for a, b in pairs]
            if self.worst is None or layer.rank_max_over_mean > self.worst[1].rank_max_over_mean:
                self.worst = loads.step, layer
        self.num_dead = sum(len(layer.dead_experts) for layer in loads.layers)
        self.num_experts = sum(len(layer.share) for layer in loads.layers)

    def relative_loads(self) -> list[list[float]]:
        """Return each layer's loads over the mean of its experts, the steps' mean; 1 is even."""
        return [
            [share * len(shares) / sum(shares) for share in shares]
            for shares in self.shares.values()
        ]

    def describe(self, ep_size: int, planned: float | None) -> str:
        """Say what imbalance has cost.

        Args:
            ep_size: ranks that the experts are split over.
            planned: what the plan took for the busiest rank; None without a plan.
        """
        if self.worst is None:
            return "none measured: no step was one of --expert_load_steps"
        busiest = max(self.max_over_mean)
        parts = [
            f"the busiest expert of a layer got up to {busiest:.2f} times its fair share of rows",
            f"{self.num_dead:,} of {self.num_experts:,} got no token in step {self.steps[-1]}",
        ]
        if ep_size == 1:
            return "; ".join([*parts, "with ep 1 each rank has all experts, or a slice of each"])
        mean = sum(self.rank_max_over_mean) / len(self.rank_max_over_mean)
        step, layer = self.worst
        plan = "" if planned is None else f"; the plan takes {planned:.2f} (--imbalance)"
        cost = (
            f"the others waited for a rank with {mean:.2f} times its fair share, up to "
            f"{layer.rank_max_over_mean:.2f} ({layer.layer} in step {step}){plan}"
        )
        return "; ".join([cost, *parts])


def report_loads(folder: Path, ep_size: int, planned: float | None) -> str:
    """Draw the loads of a run into its output folder, and say what they have cost. Rank 0 only.

    Args:
        folder: with `expert_load.jsonl`.
        ep_size: ranks that the experts are split over.
        planned: what the plan took for the busiest rank; None without a plan.

    Raises:
        OSError: The loads cannot be read or the picture not written.
    """
    summary = LoadSummary()
    for loads in read_loads(folder / EXPERT_LOAD_NAME):
        summary.add(loads)
    if summary.steps:
        figure = build_load_figure(summary)
        with publish_file(folder / EXPERT_LOAD_PLOT_NAME) as temporary:
            figure.savefig(temporary, format="png")
    return summary.describe(ep_size, planned)


def build_load_figure(summary: LoadSummary) -> "Figure":
    """Build the figure: a map of layers x experts, and below it the imbalance over time."""
    from matplotlib.figure import Figure  # slow to import, and only rank 0 draws

    figure = Figure(figsize=(8, 8), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    _draw_map(figure, above, summary.relative_loads())
    _draw_curves(below, summary)
    return figure


def _draw_map(figure: "Figure", axes: "Axes", loads: list[list[float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    width = max(len(layer) for layer in loads)
    rows = [[*layer, *[float("nan")] * (width - len(layer))] for layer in loads]
    highest = max(2.0, *(load for layer in loads for load in layer))
    image = axes.imshow(
        rows, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=highest
    )
    figure.colorbar(image, ax=axes, label="rows over the mean of the layer (1 is even)")
    axes.set_title("Load of each expert, mean of the measured steps", loc="left", color=TEXT_COLOUR)
    axes.set_xlabel("expert", color=TEXT_COLOUR)
    axes.set_ylabel("MoE layer", color=TEXT_COLOUR)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_curves(axes: "Axes", summary: LoadSummary) -> None:
    from matplotlib.ticker import MaxNLocator

    curves = (
        (summary.max_over_mean, RAW_COLOUR, "busiest expert, worst layer"),
        (summary.rank_max_over_mean, SMOOTH_COLOUR, "busiest rank of an ep group, mean of layers"),
    )
    marker = "o" if len(summary.steps) <= 60 else None
    for values, colour, label in curves:
        axes.plot(summary.steps, values, color=colour, marker=marker, ms=3, label=label)
    axes.set_xlabel("optimizer step", color=TEXT_COLOUR)
    axes.set_ylabel("rows, max over mean", color=TEXT_COLOUR)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(frameon=False, labelcolor=TEXT_COLOUR)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
