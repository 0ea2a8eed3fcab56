"""Show the rows of the LoRA benchmark on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.expert_lora.adapters import OURS, PEFT

_MIB = 1024**2
_MEMORY = ("experts' weights", "saved, ours", "PEFT", "ratio", "peak, ours", "PEFT", "ratio")
_TIME = ("ours, ms", "PEFT, ms", "PEFT / ours", "CPU time", "worst disagreement")
_WIDTH = 120


def show_rows(rows: list[dict[str, Any]]) -> None:
    """Print a table of memory and one of time, ratios PEFT / ours with least and largest."""
    # Wide enough for every column, also where the output is not a terminal.
    console = Console(width=max(_WIDTH, Console().width))
    console.print(_build_table("Memory, MiB", _MEMORY, [_memory_cells(row) for row in rows]))
    console.print(_build_table("Time of a step", _TIME, [_time_cells(row) for row in rows]))


def _build_table(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> Table:
    table = Table(title=title)
    for column in ("case", "tokens", "backend"):
        table.add_column(column, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for cells in rows:
        table.add_row(*cells)
    return table


def _memory_cells(row: dict[str, Any]) -> list[str]:
    cells = [*_case_cells(row), _mib(row["experts_bytes"])]
    for key in ("saved_bytes", "peak_bytes"):
        values = row[key]
        cells += [_mib(values[OURS]), _mib(values[PEFT]), f"{values['ratio']:.2f}"]
    return cells


def _time_cells(row: dict[str, Any]) -> list[str]:
    times = [f"{1000 * row['wall_s'][side]['median']:.1f}" for side in (OURS, PEFT)]
    ratios = [_spread_cell(row[key]) for key in ("ratio", "ratio_of_cpu_time")]
    return [*_case_cells(row), *times, *ratios, f"{row['worst_disagreement']:.1e}"]


def _case_cells(row: dict[str, Any]) -> list[str]:
    case = row["case"]
    return [f"{case['name']} {case['what']}", str(case["tokens"]), case["backend"]]


def _spread_cell(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f}-{values['max']:.2f})"


def _mib(size: int) -> str:
    return f"{size / _MIB:.2f}" if size < _MIB else f"{size / _MIB:.1f}"
