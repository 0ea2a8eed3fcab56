"""What `--loads` adds to a plan: the busiest rank's share of rows, before and after placement."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megablocks_utils.config.expert_balance import BALANCED, LayerBalance, MeasuredLoads
from megablocks_utils.planning.speed.layout_plan import PlanRequest, PlanRow
from megablocks_utils.planning.speed.step_cost import cost_step

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["find_slowdown", "show_loads"]


def show_loads(
    console: "Console", request: PlanRequest, rows: Sequence[PlanRow], loads: MeasuredLoads
) -> None:
    """Print a line for each layer, and one for each ep_size of the plan with the time it costs."""
    of_sizes = {row.layout.ep_size: row for row in reversed(rows) if row.layout.ep_size > 1}
    balances = {
        ep_size: {layer: loads.balance(layer, ep_size) for layer in loads.layers}
        for ep_size in sorted(of_sizes)
    }
    if not balances:
        console.print("\nWith ep_size 1 each rank has all experts, or a slice of each (--loads).")
        return
    console.print(f"\nLoads of experts, {loads.source}", markup=False, soft_wrap=True)
    console.print(_build_table(loads, balances))
    for ep_size, layers in balances.items():
        row = of_sizes[ep_size]
        before, after = (
            sum(getattr(balance, when) for balance in layers.values()) * ep_size / len(layers)
            for when in ("before", "after")
        )
        slow, fast = (find_slowdown(request, row, value) for value in (before, after))
        console.print(
            f"ep_size {ep_size}: the busiest rank has {before:.2f} times its fair share of rows, "
            f"{after:.2f} times with --expert_placement {BALANCED}; a micro-step takes "
            f"{slow:.1%} and {fast:.1%} longer than with even loads ({row.cost.regime}).",
            soft_wrap=True,
        )


def find_slowdown(request: PlanRequest, row: PlanRow, imbalance: float) -> float:
    """Return by which share a micro-step of a row is longer than with even loads.

    Only of what the busiest rank computes; a calibration knows nothing of it and is left out.
    """
    costs = [
        cost_step(
            replace(request.scenario, imbalance=value), row.layout, row.prediction, request.cluster
        ).micro_step
        for value in (imbalance, 1.0)
    ]
    return costs[0] / costs[1] - 1


def _build_table(
    loads: MeasuredLoads, balances: Mapping[int, Mapping[str, LayerBalance]]
) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    steps = max(len(lines) for lines in loads.layers.values())
    table = Table(
        title=Text(
            f"Share of a layer's rows on the busiest rank, mean of {steps} measured steps: experts "
            f"in their own order -> {BALANCED}"
        ),
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("experts", overflow="fold")
    for ep_size in balances:
        table.add_column(f"ep_size {ep_size}\neven: {1 / ep_size:.1%}", justify="right")
    for layer in loads.layers:
        found = (balances[ep_size][layer] for ep_size in balances)
        table.add_row(Text(layer), *(f"{b.before:.1%} -> {b.after:.1%}" for b in found))
    return table
