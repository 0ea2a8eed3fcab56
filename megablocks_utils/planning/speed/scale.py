"""The same run on more and more GPUs: which layout, what it needs, which link it waits for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megablocks_utils.byte_units import GB
from megablocks_utils.planning.model.units import format_gb
from megablocks_utils.planning.speed.layout_plan import (
    PlanRequest,
    PlanRow,
    choose_row,
    plan_layouts,
)
from megablocks_utils.planning.speed.step_cost import StepCost

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ScalePoint", "build_scale_table", "describe_dominance", "plan_scale"]


@dataclass(frozen=True)
class ScalePoint:
    """The plan for one number of GPUs.

    Attributes:
        world_size: GPUs.
        chosen: the layout to take; None where none fits.
        leanest: the one with the smallest peak.
        widest: the one with the largest ep_size, sharded where it can be.
    """

    world_size: int
    chosen: PlanRow | None
    leanest: PlanRow
    widest: PlanRow

    @property
    def shown(self) -> PlanRow:
        """The chosen row, or the leanest where none fits."""
        return self.chosen or self.leanest

    def as_record(self) -> dict[str, Any]:
        """Return the point as it stands in the JSON file."""
        return {
            "gpus": self.world_size,
            "chosen": self.chosen and self.chosen.as_record(),
            "leanest": self.leanest.as_record(),
            "widest": self.widest.as_record(),
            "tokens_wait_longest": waits_for_tokens(self.widest),
        }


def plan_scale(request: PlanRequest, world_sizes: Sequence[int]) -> list[ScalePoint]:
    """Plan the request's run for every number of GPUs, with the formulas."""
    points = []
    for world_size in world_sizes:
        scenario = replace(request.scenario, world_size=world_size)
        rows = plan_layouts(replace(request, scenario=scenario), with_remedies=False)
        if not rows:
            continue
        leanest = min(rows, key=lambda row: row.prediction.peak_bytes)
        widest = max(rows, key=lambda row: (row.layout.ep_size, row.layout.expert_dp == "shard"))
        points.append(ScalePoint(world_size, choose_row(rows), leanest, widest))
    return points


def waits_for_tokens(row: PlanRow) -> bool:
    """Whether tokens between nodes take longer than all weights and gradients together."""
    tokens, weights = row.cost.links["all_to_all"], _weights_s(row.cost)
    return tokens.inter_bytes > 0 and tokens.ideal_s > weights


def describe_dominance(points: Sequence[ScalePoint]) -> str:
    """Say from how many GPUs on all-to-all between nodes is waited for longer than for weights."""
    reached = [point for point in points if waits_for_tokens(point.widest)]
    crossing = [point for point in points if point.widest.cost.links["all_to_all"].inter_bytes > 0]
    if not crossing:
        return (
            "No ep_size that divides experts and GPUs is larger than a node: tokens never leave it."
        )
    if not reached:
        return (
            f"With the largest ep_size, tokens leave the node from {crossing[0].world_size:,} GPUs "
            f"on (ep_size {crossing[0].widest.layout.ep_size}), but up to "
            f"{points[-1].world_size:,} GPUs all-to-all between nodes never takes longer than "
            "gathering and reducing weights."
        )
    first = reached[0]
    chosen = [point for point in reached if point.chosen and waits_for_tokens(point.chosen)]
    end = "the chosen layouts never wait for it that long"
    if chosen:
        end = f"a chosen layout does from {chosen[0].world_size:,} GPUs on"
    return (
        f"With the largest ep_size, all-to-all between nodes takes longer than gathering and "
        f"reducing weights from {first.world_size:,} GPUs on (ep_size "
        f"{first.widest.layout.ep_size}); {end}."
    )


def build_scale_table(request: PlanRequest, points: Sequence[ScalePoint]) -> "Table":
    """Lay out a line for every number of GPUs."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = (
        f"{request.model} on more and more GPUs of {format_gb(request.capacity_bytes)} "
        f"({request.cluster.gpu.name}, {request.cluster.gpus_per_node} a node), "
        f"{request.scenario.rank_tokens:,} tokens a rank; sent: GB a rank and micro-step"
    )
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("GPUs", justify="right")
    table.add_column("layout")
    table.add_column("peak,\nGB", justify="right")
    table.add_column("")
    for head in ("sent in\nthe node", "to other\nnodes", "of it\nall-to-all"):
        table.add_column(head, justify="right")
    table.add_column("regime")
    for point in points:
        row, links = point.shown, point.shown.cost.links
        steps = row.accumulation * GB
        table.add_row(
            f"{point.world_size:,}",
            row.layout.describe(),
            f"{row.prediction.peak_bytes / GB:.1f}",
            row.verdict.name.upper(),
            f"{row.cost.intra_bytes / steps:.1f}",
            f"{row.cost.inter_bytes / steps:.1f}",
            f"{links['all_to_all'].inter_bytes / steps:.2f}",
            row.cost.regime,
        )
    return table


def _weights_s(cost: StepCost) -> float:
    return sum(link.ideal_s for name, link in cost.links.items() if name != "all_to_all")
