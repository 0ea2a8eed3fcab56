"""The report of a run as one HTML page that needs nothing else. Torch-free.

All that comes from files of the run is text here, never markup.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from megablocks_utils.byte_units import GIB, MIB
from megablocks_utils.config.secrets import find_secrets, redact_record
from megablocks_utils.training.report.run_charts import Curve, draw_curves, draw_heatmap
from megablocks_utils.training.report.run_files import Record, RunFiles

__all__ = ["GENERATOR", "build_page"]

GENERATOR = '<meta name="generator" content="megablocks_utils.report">'
"""By this a page of ours is known."""

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; }
.status { opacity: .75; margin: 0 0 1rem; overflow-wrap: anywhere; }
.grid, .facts { display: grid; gap: 1rem; margin: 0; }
.grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.facts { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.facts div { border: 1px solid #8886; border-radius: .5rem; padding: .4rem .6rem; }
.facts dt { font-size: .8rem; opacity: .75; }
.facts dd { margin: 0; font-weight: 600; }
svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; border-top: 1px solid #8884; }
th, td { padding: .25rem .6rem .25rem 0; }
td { overflow-wrap: anywhere; white-space: pre-wrap; }
td.number { text-align: right; white-space: nowrap; }
summary { cursor: pointer; font-weight: 600; padding: .5rem 0; }
"""
_CHARTS = (
    ("Gradient norm", "before clipping", "grad_norm"),
    ("Learning rate", "", "learning_rate"),
    ("Speed", "input tokens/s", "tokens_per_s"),
    ("Model FLOPs utilization", "of the dense peak", "mfu"),
)
_PLAN_WORDS = {
    "peak_bytes": "peak",
    "allocated_bytes": "between two steps",
}


def build_page(run: RunFiles) -> str:
    """Build the page; what is not there has no section."""
    run = redact_run(run)
    name = _dig(run.options, "model_name_or_path") or run.folder.resolve().name
    sections = (
        _facts(run),
        _section("Training", _grid(_training_charts(run))),
        _section("Experts", _expert_section(run.loads)),
        _section("Memory per rank: planned and measured", _memory(run.record.get("plan"))),
        _section("Answers to held-out prompts", _samples(run.samples)),
        _details("Options", run.options),
        _details("What ran", {k: run.record[k] for k in _RECORD_KEYS if k in run.record}),
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(str(name))}</title><style>{_STYLE}</style></head>\n<body>\n"
        f'<h1>{escape(str(name))}</h1>\n<p class="status">{escape(_status(run))}</p>\n'
        + "\n".join(part for part in sections if part)
        + "\n</body></html>\n"
    )


_RECORD_KEYS = ("command", "resolved", "mesh", "kernel", "versions", "commit", "hardware")


def redact_run(run: RunFiles) -> RunFiles:
    """Return the run without secrets, those of this process's environment too."""
    secrets = find_secrets(())
    values = {name: redact_record(value, secrets) for name, value in vars(run).items()}
    return RunFiles(**values)


def _status(run: RunFiles) -> str:
    done = run.steps[-1]["step"] if run.steps else 0
    total = _dig(run.record, "num_steps")
    steps = f"{done:,} steps" if total is None else f"{done:,} of {total:,} steps"
    state = str(run.record.get("status") or "not finished: it trains, or was stopped")
    return f"{state}, {steps}, in {run.folder}"


def _facts(run: RunFiles) -> str:
    losses, facts = [step["loss"] for step in run.steps], {}
    if losses:
        facts["loss, first step"] = _number(losses[0])
        facts["loss, last step"] = _number(losses[-1])
    measured = [line["eval_loss"] for line in run.evaluations if line["eval_loss"] is not None]
    if measured:
        facts["held-out loss, first"] = _number(measured[0])
        facts["held-out loss, best"] = _number(min(measured))
    speeds = [step["tokens_per_s"] for step in run.steps if step.get("tokens_per_s")]
    if speeds:
        facts["input tokens/s, median"] = f"{sorted(speeds)[len(speeds) // 2]:,.0f}"
    if run.steps:
        facts["peak memory, fullest rank"] = _bytes(run.steps[-1].get("mem_peak_bytes"))
    runtime_s = run.record.get("train_runtime_s")
    if isinstance(runtime_s, int | float):
        facts["training time"] = f"{runtime_s:,.0f} s"
    parts = [f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items()]
    return f'<dl class="facts">{"".join(parts)}</dl>' if parts else ""


def _training_charts(run: RunFiles) -> Iterator[str]:
    curves = [Curve("training", _points(run.steps, "loss"))] if run.steps else []
    if run.evaluations:
        curves.append(Curve("held-out", _points(run.evaluations, "eval_loss"), has_marks=True))
    if curves:
        yield draw_curves("Loss", "nats per label token", curves)
    for title, unit, key in _CHARTS:
        if points := _points(run.steps, key):
            yield draw_curves(title, unit, [Curve(key, points)])


def _expert_section(lines: Sequence[Record]) -> str:
    """Show the loads; lines are one for each layer of a measured step."""
    if not lines:
        return ""
    by_layer: dict[str, list[Record]] = {}
    by_step: dict[int, list[Record]] = {}
    for line in lines:
        by_layer.setdefault(line["layer"], []).append(line)
        by_step.setdefault(line["step"], []).append(line)
    rows = [_mean_loads(layer) for layer in by_layer.values()]
    expert = [(s, max(line["max_over_mean"] for line in group)) for s, group in by_step.items()]
    ranks = [
        (step, sum(line["rank_max_over_mean"] for line in group) / len(group))
        for step, group in by_step.items()
    ]
    curves = [
        Curve("busiest expert, worst layer", expert),
        Curve("busiest rank, mean of layers", ranks),
    ]
    last = by_step[max(by_step)]
    dead, number = (sum(len(line[key]) for line in last) for key in ("dead_experts", "share"))
    charts = (
        draw_heatmap("Load over the layer's mean, mean of the measured steps", rows),
        draw_curves("Imbalance", "rows, max over mean", curves),
    )
    note = f"{dead:,} of {number:,} experts got no token in step {max(by_step):,}."
    return f"{_grid(charts)}<p>{escape(note)}</p>"


def _mean_loads(lines: Sequence[Record]) -> list[float]:
    number = max(len(line["share"]) for line in lines)
    shares = [[*line["share"], *[0.0] * (number - len(line["share"]))] for line in lines]
    return [number * sum(column) / len(lines) for column in zip(*shares, strict=True)]


def _memory(plan: object) -> str:
    if not isinstance(plan, dict) or "predicted" not in plan:
        return ""
    sides = (plan["predicted"], plan.get("measured") or {})
    components = [side.get("components") or {} for side in sides]
    rows = [
        (key.replace("_", " "), *(side.get(key) for side in components)) for key in components[0]
    ]
    rows += [(word, *(side.get(key) for side in sides)) for key, word in _PLAN_WORDS.items()]
    cells = "".join(
        f"<tr><th>{escape(word)}</th>"
        + "".join(f'<td class="number">{escape(_bytes(value))}</td>' for value in values)
        + "</tr>"
        for word, *values in rows
    )
    head = '<tr><th></th><td class="number">planned</td><td class="number">measured</td></tr>'
    note = ""
    if plan.get("base_bytes"):
        note = "<p>Measured on a CPU: with what the C library keeps of freed memory.</p>"
    return f'<div class="wide"><table>{head}{cells}</table></div>{note}'


def _samples(lines: Sequence[Record]) -> str:
    """Show the last answer to each prompt beside the first."""
    if not lines:
        return ""
    first: dict[str, Record] = {}
    last: dict[str, Record] = {}
    for line in lines:
        key = f"{line.get('sample')} {line.get('prompt')}"
        first.setdefault(key, line)
        last[key] = line
    sides = (lines[0], lines[-1])
    names = ("prompt", *(f"after step {side.get('step')}" for side in sides), "expected")
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = "".join(
        _row(
            (line.get("prompt"), first[key].get("answer"), line.get("answer"), line.get("expected"))
        )
        for key, line in last.items()
    )
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _row(values: Sequence[object]) -> str:
    return f"<tr>{''.join(f'<td>{escape(_text(value))}</td>' for value in values)}</tr>"


def _details(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(_row(pair) for pair in _flatten(values))
    if not rows:
        return ""
    table = f'<div class="wide"><table>{rows}</table></div>'
    return f"<details><summary>{escape(title)}</summary>{table}</details>"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, prefix if prefix else f"{name}: ")
        else:
            yield f"{prefix}{name}", _text(value)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _grid(parts: "Iterator[str] | Sequence[str]") -> str:
    content = "".join(f"<div>{part}</div>" for part in parts)
    return f'<div class="grid">{content}</div>' if content else ""


def _points(lines: Sequence[Record], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of lines that hold the key; null is a value that was not finite."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    if all(value is None for _, value in points):
        return []
    return [(step, math.nan if value is None else value) for step, value in points]


def _dig(values: Mapping[str, Any], name: str) -> Any:
    """Return a value by its name, in whatever section it is."""
    if name in values:
        return values[name]
    found = (_dig(value, name) for value in values.values() if isinstance(value, Mapping))
    return next((value for value in found if value is not None), None)


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _bytes(value: object) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value / GIB:,.2f} GiB" if value >= GIB else f"{value / MIB:,.2f} MiB"
