"""The table as Markdown, from the content of its JSON file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.harness.outcome import MEASURED, NOT_MEASURED
from benchmarks.harness.provenance import describe_provenance
from benchmarks.harness.report import format_spread, markdown_table
from benchmarks.table.options import CPU, PLAN
from megablocks_utils.byte_units import GB, GIB

Entry = Mapping[str, Any]
Column = tuple[str, Callable[[Entry], str]]

_NOTHING = "-"
_MB = 10**6


def write_markdown(content: Mapping[str, Any]) -> str:
    """Return the provenance, the tables, the errors and the notes."""
    rows = shown_rows(content)
    parts = [_describe(content)]
    if any((row.get("measured") or {}).get("micro_step_s") for row in rows):
        parts += ["Time:", _table(_time_columns(content), rows)]
    parts += ["Memory of the fullest rank:", _table(_memory_columns(content), rows)]
    parts += [_list(_errors(content)), _list(_notes(content))]
    return "\n\n".join(part for part in parts if part) + "\n"


def shown_rows(content: Mapping[str, Any]) -> list[Entry]:
    """Return the rows that have something to show in this mode: in a plan, those it predicts."""
    return [row for row in content["rows"] if content["mode"] != PLAN or row["predicted"]]


def predicted_bytes(row: Entry, word: str) -> int | None:
    """Return what is predicted of `peak` or `allocated`, with the base of the process if it counts.

    None where there is no prediction, or the base was not measured.
    """
    if row["has_base"]:
        return row.get("against_predicted", {}).get(word, {}).get("predicted_bytes")
    return (row["predicted"] or {}).get(f"{word}_bytes")


def _describe(content: Mapping[str, Any]) -> str:
    bench, hardware = content["bench"], content["hardware"]
    words = [describe_provenance(content)]
    if content["mode"] != PLAN:
        where = hardware["gpus"][0] if hardware["gpus"] else f"{hardware['cpu']}, no GPU"
        words.append(f"torch {content['versions']['torch']}, {where}")
    shape = bench["config"]
    words.append(
        f"{shape['model_type']} with hidden {shape['hidden_size']}, "
        f"{shape['num_hidden_layers']} layers, {shape['num_local_experts']} experts"
    )
    words.append(
        f"{bench['ranks']} ranks, {bench['tokens']} tokens a rank and micro-step, accumulation "
        f"{bench['accumulation']}, {bench['precision']}"
    )
    if content["mode"] not in (PLAN, "one_gpu"):
        words.append(
            f"{bench['rounds']} x {bench['steps']} steps measured after {bench['warmup_steps']}"
        )
    return "; ".join(words) + "."


def _time_columns(content: Mapping[str, Any]) -> list[Column]:
    columns: list[Column] = [("row", _title)]
    if content["is_published"]:
        columns.append(("s a micro-step, published (inferred)", _published_time))
    return [
        *columns,
        ("s a micro-step, measured", lambda row: _spread(_measured(row, "micro_step_s"), 3)),
        ("tokens/s", lambda row: _spread(_measured(row, "tokens_per_s"), 0)),
        ("no ep / this, published", lambda row: _ratio(row, "no_ep", "published")),
        ("no ep / this, measured", lambda row: _ratio(row, "no_ep", "measured")),
        ("transformers / this", lambda row: _ratio(row, "transformers", "measured")),
    ]


def _memory_columns(content: Mapping[str, Any]) -> list[Column]:
    unit = _MB if content["mode"] == CPU else GB
    name = "MB" if unit == _MB else "GB"
    columns: list[Column] = [("row", _title)]
    for word in ("peak", "allocated"):
        heads = [f"{word} {name}, published", "predicted", "measured", "error"]
        cells = [_published_bytes, _predicted_bytes, _measured_bytes, _error]
        pairs = list(zip(heads, cells, strict=True))
        kept = pairs[0 if content["is_published"] else 1 : 2 if content["mode"] == PLAN else 3]
        columns += [
            (head if head.startswith(word) else f"{word} {name}, {head}", _of(cell, word, unit))
            for head, cell in [*kept, pairs[3]]
        ]
    if content["mode"] == PLAN:
        columns.append(("peak GiB, predicted", _of(_predicted_bytes, "peak", GIB)))
        columns.append(("peak in", lambda row: (row["predicted"] or {}).get("moment", _NOTHING)))
    return columns


def _of(cell: Callable[[Entry, str, int], str], word: str, unit: int) -> Callable[[Entry], str]:
    return lambda row: cell(row, word, unit)


def _table(columns: Sequence[Column], rows: Sequence[Entry]) -> str:
    cells = [[cell(row) for _, cell in columns] for row in rows]
    return markdown_table([head for head, _ in columns], cells)


def _title(row: Entry) -> str:
    return f"`{row['row']}`: {row['title']}"


def _measured(row: Entry, key: str) -> Any:
    """Return a measured number, or the word that takes its place."""
    if row["status"] not in (MEASURED, NOT_MEASURED):
        return row["status"]
    return (row.get("measured") or {}).get(key)


def _spread(values: Any, digits: int) -> str:
    if values is None or isinstance(values, str):
        return values or _NOTHING
    return format_spread(values, digits)


def _published_time(row: Entry) -> str:
    published = row["published"]
    if published is None:
        return _NOTHING
    return "OOM" if published["is_oom"] else f"{published['micro_step_s']:.2f}"


def _ratio(row: Entry, name: str, kind: str) -> str:
    ratio = row["ratios"].get(name, {}).get(kind)
    if ratio is None:
        return _NOTHING
    return f"{ratio:.2f}" if kind == "published" else format_spread(ratio, is_bold=True)


def _published_bytes(row: Entry, word: str, unit: int) -> str:
    published = row["published"]
    if published is None:
        return _NOTHING
    return "OOM" if published["is_oom"] else f"{published[f'{word}_bytes'] / unit:.0f}"


def _predicted_bytes(row: Entry, word: str, unit: int) -> str:
    number = predicted_bytes(row, word)
    if number is None:
        return _NOTHING
    oom = " (OOM)" if row["predicted"]["is_oom"] and word == "peak" else ""
    return _bytes(number, unit) + oom


def _measured_bytes(row: Entry, word: str, unit: int) -> str:
    number = _measured(row, f"{word}_bytes")
    if number is None or isinstance(number, str):
        return number or _NOTHING
    return _bytes(number, unit)


def _error(row: Entry, word: str, unit: int) -> str:
    """Return the error of the prediction against measurement; in a plan, against publication."""
    del unit
    if "against_predicted" in row:
        return f"{row['against_predicted'][word]['error']:+.1%}"
    if row["status"] == NOT_MEASURED and row["published_error"]:
        return f"{row['published_error'][word]:+.1%}"
    return _NOTHING


def _bytes(number: float, unit: int) -> str:
    return f"{number / unit:.{0 if unit == _MB else 1}f}"


def _errors(content: Mapping[str, Any]) -> list[str]:
    lines = []
    against = {"published_error": "published", "against_predicted": "measured"}
    for key, name in against.items():
        for word, summary in content["errors"][key].items():
            if summary:
                lines.append(
                    f"predicted against {name}, {word}: mean error {summary['mean']:.1%}, worst "
                    f"{summary['worst']:+.1%} (n = {summary['n']})"
                )
    return lines


def _notes(content: Mapping[str, Any]) -> list[str]:
    rows = shown_rows(content)
    lines = [f"`{row['row']}`, {row['status']}: {row['reason']}" for row in rows if row["reason"]]
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in row["notes"]:
            notes.setdefault(note, []).append(f"`{row['row']}`")
    lines += [f"{', '.join(names)}: {note}" for note, names in notes.items()]
    if content["is_published"] and any(
        row["published"] and row["published"]["is_before_zero_grad"] for row in rows
    ):
        lines.append(
            "`full-none`: its published allocated bytes fit only with gradients alive (inferred); "
            "its error is that of our allocated bytes and gradients together."
        )
    if len(rows) < len(content["rows"]):
        lines.append("transformers' own expert parallelism is not predicted: no plan knows it.")
    lines.append(f"Published: {content['published_on']}")
    return lines


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
