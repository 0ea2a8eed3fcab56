"""The plan for people: two tables, the choice and its command, remedies, what it rests on."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megablocks_utils.byte_units import GB
from megablocks_utils.planning.memory.verdict import FITS, OOM, TIGHT
from megablocks_utils.planning.model.prediction import COLLECTIVES, COMPONENTS
from megablocks_utils.planning.model.units import choose_unit, format_count, format_gb
from megablocks_utils.planning.speed.launch_lines import break_line
from megablocks_utils.planning.speed.layout_plan import PlanRequest, PlanRow, choose_row
from megablocks_utils.planning.speed.scale import ScalePoint, build_scale_table, describe_dominance

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

__all__ = ["build_console", "build_memory_table", "build_speed_table", "show_plan", "show_scale"]

WIDE, _TEXT_WIDTH, _REPORT_WIDTH = 100, 100, 120
_STYLES = {FITS: "green", TIGHT: "yellow", OOM: "red"}
_HEADS = {
    "parameters": "param-\neters",
    "gradients": "gradi-\nents",
    "optimizer": "opti-\nmizer",
    "fsdp_buffers": "FSDP\nbuffers",
    "activations": "activa-\ntions",
    "dispatch_buffers": "dis-\npatch",
}
_SENT_HEADS = {
    "all_gather": "all-\ngather",
    "reduce_scatter": "reduce-\nscatter",
    "all_to_all": "all-to-\nall",
    "all_reduce": "all-\nreduce",
}


def build_console(*, stderr: bool = False) -> "Console":
    """Build the console of a report: as wide as the terminal, or 120 columns in a file."""
    from rich.console import Console

    console = Console(highlight=False, stderr=stderr)
    is_set = "COLUMNS" in os.environ
    if console.is_terminal or is_set:
        return console
    return Console(highlight=False, width=_REPORT_WIDTH, stderr=stderr)


def show_plan(
    console: "Console", request: PlanRequest, rows: Sequence[PlanRow], assumptions: Sequence[str]
) -> None:
    """Print the whole report; commands are printed as they are, whatever the width."""
    from rich.text import Text

    chosen = choose_row(rows)
    console.print(Text(_title(request), style="bold"))
    console.print(build_memory_table(rows, chosen, console.width))
    console.print(build_speed_table(request, rows, chosen, console.width))
    console.print(_describe_choice(request, rows, chosen))
    if chosen is not None and chosen.launch is not None:
        command = break_line(chosen.launch, _TEXT_WIDTH)
        console.print(f"\n{command}", markup=False, soft_wrap=True)
    rejected = [row for row in rows if row.verdict.name == OOM]
    if rejected:
        console.print(_describe_remedies(rejected))
    console.print(_list("What this rests on", assumptions))


def show_scale(
    console: "Console",
    request: PlanRequest,
    points: Sequence[ScalePoint],
    assumptions: Sequence[str],
) -> None:
    """Print a line for every number of GPUs, and where all-to-all between nodes takes over."""
    from rich.text import Text

    console.print(build_scale_table(request, points))
    console.print(Text(describe_dominance(points), style="bold"))
    console.print(_list("What this rests on", assumptions))


def build_memory_table(rows: Sequence[PlanRow], chosen: PlanRow | None, width: int) -> "Table":
    """Lay out bytes by component; on a narrow console only the sum and the largest one."""
    parts = COMPONENTS if width >= WIDE else ()
    unit = choose_unit(max(row.prediction.peak_bytes for row in rows))
    table = _build_table(f"Memory of the fullest rank at its peak, {unit.binary}", rows)
    for name in parts:
        table.add_column(_HEADS[name], justify="right")
    for head in ("peak", f"peak,\n{unit.decimal}", "head-\nroom"):
        table.add_column(head, justify="right")
    table.add_column("")
    table.add_column("largest" if width >= WIDE else "", overflow="fold")
    for row in rows:
        table.add_row(
            *_layout_cells(row, row is chosen),
            *(unit.format_binary(row.prediction.components[name]) for name in parts),
            unit.format_binary(row.prediction.peak_bytes),
            unit.format_decimal(row.prediction.peak_bytes),
            unit.format_binary(row.verdict.headroom_bytes),
            _verdict_cell(row),
            row.verdict.cause,
        )
    return table


def build_speed_table(
    request: PlanRequest, rows: Sequence[PlanRow], chosen: PlanRow | None, width: int
) -> "Table":
    """Lay out what is sent, and the order of speed with what holds each row up."""
    tokens = request.scenario.rank_tokens
    title = f"GB a rank sends in a micro-step, and speed at {tokens:,} tokens a rank"
    table = _build_table(title, rows)
    kinds = COLLECTIVES if width >= WIDE else ()
    for name in kinds:
        table.add_column(_SENT_HEADS[name], justify="right")
    table.add_column("all", justify="right")
    has_nodes = request.scenario.world_size > request.cluster.gpus_per_node
    if has_nodes:
        table.add_column("to other\nnodes", justify="right")
    table.add_column("rank", justify="right")
    table.add_column("time,\nbest = 1", justify="right")
    if request.calibration is not None:
        table.add_column("seconds\na step", justify="right")
    table.add_column("regime")
    for row in rows:
        sent = row.sent_bytes_per_micro_step()
        cells = [_format_sent(sent[name]) for name in kinds]
        cells.append(_format_sent(sum(sent.values())))
        if has_nodes:
            cells.append(_format_sent(row.cost.inter_bytes / row.accumulation))
        cells.append("-" if row.rank is None else str(row.rank))
        cells.append("-" if row.relative_cost is None else f"{row.relative_cost:.2f}")
        if row.cost.step_s is not None:
            cells.append(f"{row.cost.step_s:.2f}")
        table.add_row(*_layout_cells(row, row is chosen), *cells, row.cost.regime)
    return table


def _build_table(title: str, rows: Sequence[PlanRow]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title),
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("ep_\nsize", justify="right")
    table.add_column("expert_\ndp")
    return table


def _layout_cells(row: PlanRow, is_chosen: bool) -> "tuple[RenderableType, ...]":
    from rich.text import Text

    style = "bold" if is_chosen else ""
    mark = "> " if is_chosen else ""
    return Text(f"{mark}{row.layout.ep_size}", style=style), Text(row.layout.expert_dp, style=style)


def _verdict_cell(row: PlanRow) -> "RenderableType":
    from rich.text import Text

    return Text(row.verdict.name.upper(), style=_STYLES[row.verdict.name])


def _title(request: PlanRequest) -> str:
    scenario, gpu = request.scenario, request.cluster.gpu
    run = scenario.planned_run()
    source = "" if request.capacity_bytes == gpu.memory_bytes else "links of "
    trained = "all weights" if run.use_lora == "none" else f"LoRA {run.use_lora} r{run.lora_r}"
    packed = "" if run.packed_format is None else f", experts in {run.packed_format}"
    return (
        f"{request.model}: {format_count(scenario.shape.num_parameters)} parameters, "
        f"{format_count(scenario.shape.num_active_parameters)} active, on {scenario.world_size} x "
        f"{format_gb(request.capacity_bytes)} ({source}{gpu.name}); {trained}{packed}, "
        f"{run.precision.name}, {run.entry_point}"
    )


def _describe_choice(
    request: PlanRequest, rows: Sequence[PlanRow], chosen: PlanRow | None
) -> "RenderableType":
    from rich.text import Text

    if chosen is None:
        least = min(rows, key=lambda row: row.prediction.peak_bytes)
        return Text(
            f"No row fits: the leanest, {least.layout.describe()}, needs "
            f"{format_gb(least.prediction.peak_bytes)} beside the reserve and a GPU has "
            f"{format_gb(request.capacity_bytes)}.",
            style="bold",
        )
    why = "the fastest that fits" if chosen.verdict.name == FITS else "nothing fits with reserve"
    words = (
        f"Chosen: {chosen.layout.describe()} ({why}; {chosen.cost.regime} at "
        f"{request.scenario.rank_tokens:,} tokens a rank and micro-step; peak "
        f"{format_gb(chosen.prediction.peak_bytes)} in the {chosen.prediction.moment})"
    )
    end = "" if chosen.launch is None else ":"
    return Text(words + end, style="bold")


def _describe_remedies(rejected: Sequence[PlanRow]) -> "RenderableType":
    lines = []
    for row in rejected:
        helps = "; ".join(row.remedies) or "nothing that was tried"
        lines.append(f"{row.layout.describe()}: {helps}")
    return _list("What would make the others fit, and their peak then", lines)


def _list(title: str, lines: Sequence[str]) -> "RenderableType":
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    for line in lines:
        grid.add_row("-", Text(line))
    return Padding(Group(Text(title, style="bold"), grid), (1, 0, 0, 0))


def _format_sent(number: float) -> str:
    if number < GB / 10_000:
        return "0" if number == 0 else "~0"
    return f"{number / GB:.1f}" if number >= GB else f"{number / GB:.3f}"
