"""Markdown tables of the layer benchmark."""

from collections.abc import Iterable
from typing import Any

from benchmarks.moe_layer.cases import MODES
from benchmarks.moe_layer.contenders import OURS_GROUPED_MM, TITLES
from benchmarks.moe_layer.measure import MEASURED, SKIPPED

_GIB, _MIB = 2**30, 2**20
Row = dict[str, Any]


def gpu_tables(rows: list[Row]) -> str:
    """Return a table of even routing for each shape, then one of the other routings.

    What was skipped is not in them: `missing_rows` says it, and why, in fewer lines.
    """
    rows = [row for row in rows if row["status"] != SKIPPED]
    names = list(dict.fromkeys(row["case"]["name"] for row in rows))
    tables = [f"**{name}**\n\n{_shape_table(_rows_of(rows, name))}" for name in names]
    uneven = [row for row in rows if row["case"]["routing"] != "uniform"]
    if uneven:
        tables.append(f"**Uneven routing**, forward and backward, ms\n\n{_routing_table(rows)}")
    return "\n\n".join(tables)


def missing_rows(rows: Iterable[Row]) -> str:
    """Return a list of what was not measured and why, equal reasons together."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != MEASURED:
            case = row["case"]
            key = (row["side"], row["status"], row["reason"])
            reasons.setdefault(key, []).append(f"{case['name']} {case['mode']} {case['routing']}")
    return "\n".join(
        f"- {TITLES[side]}, {status} ({_some(cases)}): {reason}"
        for (side, status, reason), cases in reasons.items()
    )


def cpu_table(rows: Iterable[Row]) -> str:
    """Return a table of our grouped_mm layer against each other side."""
    lines = _header(
        "case", "dtype", "trained", "against", "ours, ms", "other, ms", "other / ours",
        "CPU time", "saved, MiB", "peak, MiB",
    )  # fmt: skip
    for row in rows:
        case = row["case"]
        for other, compared in row["against"].items():
            wall = [compared["wall_s"][name]["median"] for name in (OURS_GROUPED_MM, other)]
            memory = [_pair(row["memory"], key, other) for key in ("saved_bytes", "peak_bytes")]
            cells = [f"{case['name']}, {case['tokens']} tokens", case["dtype"], case["mode"]]
            cells += [TITLES[other], *(f"{1e3 * seconds:.1f}" for seconds in wall)]
            cells += [_ratio(compared["ratio"]), _ratio(compared["ratio_of_cpu_time"]), *memory]
            lines.append(_line(cells))
    return "\n".join(lines)


def _shape_table(rows: list[Row]) -> str:
    lines = _header(
        "trained", "side", "forward, ms", "and backward, ms", "TFLOP/s", "of peak",
        "of floor", "of H100's floor", "saved, GiB", "peak, GiB",
    )  # fmt: skip
    for mode in _modes_of(rows):
        for row in (row for row in rows if row["case"]["mode"] == mode):
            cells = (
                _measured_cells(row) if row["status"] == MEASURED else [row["status"]] + 7 * [""]
            )
            lines.append(_line([mode, TITLES[row["side"]], *cells]))
    return "\n".join(lines)


def _measured_cells(row: Row) -> list[str]:
    both = row["derived"]["forward_backward"]
    shares = [both[key] for key in ("share_of_peak", "share_here", "share_h100")]
    return [
        _spread(row["ms"]["forward"]),
        _spread(row["ms"]["forward_backward"]),
        f"{both['tflops']:.0f}",
        *(f"{share:.0%}" for share in shares),
        f"{row['saved_bytes'] / _GIB:.2f}",
        f"{row['peak_bytes'] / _GIB:.2f}",
    ]


def _routing_table(rows: list[Row]) -> str:
    routings = list(dict.fromkeys(row["case"]["routing"] for row in rows))
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        key = (row["case"]["name"], row["case"]["mode"], row["side"])
        is_measured = row["status"] == MEASURED
        text = f"{row['ms']['forward_backward']['median']:.2f}" if is_measured else row["status"]
        found.setdefault(key, {})[row["case"]["routing"]] = text
    lines = _header("shape", "trained", "side", *routings)
    for (shape, mode, side), cells in found.items():
        lines.append(_line([shape, mode, TITLES[side], *(cells.get(r, "") for r in routings)]))
    return "\n".join(lines)


def _rows_of(rows: list[Row], name: str) -> list[Row]:
    order = list(TITLES)
    of_shape = [r for r in rows if r["case"]["name"] == name and r["case"]["routing"] == "uniform"]
    return sorted(of_shape, key=lambda row: order.index(row["side"]))


def _modes_of(rows: list[Row]) -> list[str]:
    seen = {row["case"]["mode"] for row in rows}
    return [mode.name for mode in MODES if mode.name in seen]


def _pair(memory: dict[str, dict[str, int]], key: str, other: str) -> str:
    ours, theirs = memory[OURS_GROUPED_MM][key], memory[other][key]
    return f"{ours / _MIB:.1f} / {theirs / _MIB:.1f}"


def _ratio(values: dict[str, float]) -> str:
    return f"**{values['median']:.2f}** ({values['min']:.2f}-{values['max']:.2f})"


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f}-{values['max']:.2f})"


def _some(cases: list[str]) -> str:
    return cases[0] if len(cases) == 1 else f"{len(cases)} cases, {cases[0]} first"


def _header(*columns: str) -> list[str]:
    return [_line(columns), "|" + "---|" * len(columns)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
