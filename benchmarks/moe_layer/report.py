"""Report of the layer benchmark: tables, aims and the chart, from its result files."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness.outcome import MEASURED
from benchmarks.harness.provenance import describe_provenance
from benchmarks.harness.record import Record, Row
from benchmarks.harness.report import format_spread, group_rows, markdown_table
from benchmarks.moe_layer.aims import cpu_aims, gpu_aims
from benchmarks.moe_layer.cases import MODES
from benchmarks.moe_layer.contenders import OURS_GROUPED_MM, TITLES
from benchmarks.moe_layer.measure import SKIPPED
from megablocks_utils.byte_units import GIB, MIB

NOTHING_TIMED = "No GPU was at hand: nothing was timed on one."
_SHAPE_COLUMNS = (
    *("trained", "side", "forward, ms", "and backward, ms", "TFLOP/s", "of peak"),
    *("of floor", "of H100's floor", "saved, GiB", "peak, GiB"),
)
_CPU_COLUMNS = (
    *("case", "dtype", "trained", "against", "ours, ms", "other, ms", "other / ours"),
    *("CPU time", "saved, MiB", "peak, MiB"),
)


def build_report(gpu: Path | None, cpu: Path | None, chart: Path | None = None) -> dict[str, str]:
    """Return Markdown of the GPU's part and of the CPU's; draw the chart if it is named.

    Of a file that is missing the report says so, and lists the aims all the same.
    """
    return {"gpu": _gpu_part(_read(gpu), chart), "cpu": _cpu_part(_read(cpu))}


def _gpu_part(content: dict[str, Any] | None, chart: Path | None) -> str:
    rows = content["rows"] if content else []
    aims = "\n".join(aim.line() for aim in gpu_aims(rows))
    if content is None or not any(row["status"] == MEASURED for row in rows):
        return f"{NOTHING_TIMED}\n\nAims on one H100:\n\n{aims}"
    machine = content["machine"]
    head = (
        f"{_describe(content)} {content['device']['name']}: "
        f"{machine['flops_per_s'] / 1e12:.0f} TFLOP/s in a large bf16 product, "
        f"{machine['bytes_per_s'] / 1e12:.2f} TB/s in a large copy."
    )
    parts = [head, f"Aims on one H100:\n\n{aims}", _gpu_tables(rows)]
    if chart:
        # Imported only here: matplotlib takes longer than all the rest of a contender's process.
        importlib.import_module("benchmarks.moe_layer.chart").draw_chart(content, chart)
        parts.insert(2, f"![Rates by shape, mode and side]({chart.name})")
    if missing := _missing_rows(rows):
        parts.append(f"Not measured:\n\n{missing}")
    return "\n\n".join(parts)


def _cpu_part(content: dict[str, Any] | None) -> str:
    if content is None:
        return "Not measured yet."
    rows = content["rows"]
    aims = "\n".join(aim.line() for aim in cpu_aims(rows))
    head = f"{_describe(content)} {content['hardware']['cpu']}, {content['threads']} thread(s)."
    table = markdown_table(_CPU_COLUMNS, _cpu_cells(rows), len(_CPU_COLUMNS))
    return f"{head}\n\n{table}\n\nAims:\n\n{aims}"


def _describe(content: dict[str, Any]) -> str:
    return f"{describe_provenance(content)}, torch {content['versions']['torch']};"


def _read(path: Path | None) -> dict[str, Any] | None:
    return Record.read(path).content if path and path.exists() else None


def _gpu_tables(rows: list[Row]) -> str:
    """Return a table of even routing for each shape, then one of the other routings.

    What was skipped is not in them: `_missing_rows` lists it, and why, in fewer lines.
    """
    rows = [row for row in rows if row["status"] != SKIPPED]
    names = list(dict.fromkeys(row["case"]["name"] for row in rows))
    tables = [f"**{name}**\n\n{_shape_table(_even_rows(rows, name))}" for name in names]
    if any(row["case"]["routing"] != "uniform" for row in rows):
        tables.append(f"**Uneven routing**, forward and backward, ms\n\n{_routing_table(rows)}")
    return "\n\n".join(tables)


def _missing_rows(rows: Iterable[Row]) -> str:
    """Return a list of what was not measured and why, equal reasons together."""
    missing = [row for row in rows if row["status"] != MEASURED]
    lines = []
    for (side, status, reason), group in group_rows(missing, "side", "status", "reason").items():
        case = "{name} {mode} {routing}".format(**group[0]["case"])
        cases = case if len(group) == 1 else f"{len(group)} cases, {case} first"
        lines.append(f"- {TITLES[side]}, {status} ({cases}): {reason}")
    return "\n".join(lines)


def _cpu_cells(rows: Iterable[Row]) -> Iterable[list[str]]:
    """Yield the line of our grouped_mm layer against each other contender."""
    for row in rows:
        case = row["case"]
        for other, compared in row["against"].items():
            wall = [compared["wall_s"][name]["median"] for name in (OURS_GROUPED_MM, other)]
            memory = [_pair(row["memory"], key, other) for key in ("saved_bytes", "peak_bytes")]
            ratios = [compared[key] for key in ("ratio", "ratio_of_cpu_time")]
            yield [
                *(f"{case['name']}, {case['tokens']} tokens", case["dtype"], case["mode"]),
                *(TITLES[other], *(f"{1e3 * seconds:.1f}" for seconds in wall)),
                *(*(format_spread(ratio, is_bold=True) for ratio in ratios), *memory),
            ]


def _shape_table(rows: list[Row]) -> str:
    lines = []
    for mode in _modes_of(rows):
        for row in (row for row in rows if row["case"]["mode"] == mode):
            is_measured = row["status"] == MEASURED
            cells = _measured_cells(row) if is_measured else [row["status"]] + 7 * [""]
            lines.append([mode, TITLES[row["side"]], *cells])
    return markdown_table(_SHAPE_COLUMNS, lines, len(_SHAPE_COLUMNS))


def _measured_cells(row: Row) -> list[str]:
    both = row["derived"]["forward_backward"]
    shares = [both[key] for key in ("share_of_peak", "share_here", "share_h100")]
    return [
        format_spread(row["ms"]["forward"]),
        format_spread(row["ms"]["forward_backward"]),
        f"{both['tflops']:.0f}",
        *(f"{share:.0%}" for share in shares),
        f"{row['saved_bytes'] / GIB:.2f}",
        f"{row['peak_bytes'] / GIB:.2f}",
    ]


def _routing_table(rows: list[Row]) -> str:
    routings = list(dict.fromkeys(row["case"]["routing"] for row in rows))
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        key = (row["case"]["name"], row["case"]["mode"], TITLES[row["side"]])
        is_measured = row["status"] == MEASURED
        text = f"{row['ms']['forward_backward']['median']:.2f}" if is_measured else row["status"]
        found.setdefault(key, {})[row["case"]["routing"]] = text
    columns = ("shape", "trained", "side", *routings)
    lines = [[*key, *(cells.get(name, "") for name in routings)] for key, cells in found.items()]
    return markdown_table(columns, lines, len(columns))


def _even_rows(rows: list[Row], name: str) -> list[Row]:
    order = list(TITLES)
    of_shape = [r for r in rows if r["case"]["name"] == name and r["case"]["routing"] == "uniform"]
    return sorted(of_shape, key=lambda row: order.index(row["side"]))


def _modes_of(rows: list[Row]) -> list[str]:
    seen = {row["case"]["mode"] for row in rows}
    return [mode.name for mode in MODES if mode.name in seen]


def _pair(memory: dict[str, dict[str, int]], key: str, other: str) -> str:
    ours, theirs = memory[OURS_GROUPED_MM][key], memory[other][key]
    return f"{ours / MIB:.1f} / {theirs / MIB:.1f}"
