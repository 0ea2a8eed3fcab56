"""Tables, aims and the chart, from the files of measurements."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.moe_layer.aims import cpu_aims, gpu_aims
from benchmarks.moe_layer.measure import MEASURED
from benchmarks.moe_layer.tables import cpu_table, gpu_tables, missing_rows

NOTHING_TIMED = "No GPU was at hand: nothing was timed on one."


def build_report(gpu: Path, cpu: Path, chart: Path | None) -> dict[str, str]:
    """Return Markdown of the GPU's part and of the CPU's; draw the chart if it is named.

    A file that is missing is said to be missing; the aims are listed all the same.
    """
    return {"gpu": _gpu_part(_read(gpu), chart), "cpu": _cpu_part(_read(cpu))}


def fill_in(text: str, parts: dict[str, str], of: str = "moe_layer") -> str:
    """Put each part between its marks, `<!-- OF: NAME -->` and `<!-- end -->`."""
    for name, part in parts.items():
        start, end = f"<!-- {of}: {name} -->", "<!-- end -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        block = f"{start}\n\n{part}\n\n{end}"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def _gpu_part(content: dict[str, Any] | None, chart: Path | None) -> str:
    rows = content["rows"] if content else []
    aims = "\n".join(aim.line() for aim in gpu_aims(rows))
    if not any(row["status"] == MEASURED for row in rows):
        return f"{NOTHING_TIMED}\n\nAims on one H100:\n\n{aims}"
    machine = content["machine"]
    told = (
        f"{_origin(content)} {content['device']['name']}: "
        f"{machine['flops_per_s'] / 1e12:.0f} TFLOP/s in a large bf16 product, "
        f"{machine['bytes_per_s'] / 1e12:.2f} TB/s in a large copy."
    )
    parts = [told, f"Aims on one H100:\n\n{aims}", gpu_tables(rows)]
    if chart:
        # Imported only here: matplotlib takes longer than all the rest of a side's process.
        importlib.import_module("benchmarks.moe_layer.chart").draw_chart(content, chart)
        parts.insert(2, f"![Rates by shape, mode and side]({chart.name})")
    if missing := missing_rows(rows):
        parts.append(f"Not measured:\n\n{missing}")
    return "\n\n".join(parts)


def _cpu_part(content: dict[str, Any] | None) -> str:
    if content is None:
        return "Not measured yet."
    aims = "\n".join(aim.line() for aim in cpu_aims(content["rows"]))
    told = f"{_origin(content)} {content['hardware']['cpu']}, {content['threads']} thread(s)."
    return f"{told}\n\n{cpu_table(content['rows'])}\n\nAims:\n\n{aims}"


def _origin(content: dict[str, Any]) -> str:
    commit = (content["commit"] or "unknown")[:7]
    torch_version = content["versions"]["torch"]
    return (
        f"`{content['command']}`, {content['date'][:10]}, commit {commit}, torch {torch_version};"
    )


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
