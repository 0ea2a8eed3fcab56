"""Part 4: what a rank of eight holds of Mixtral-8x7B, measured on one GPU, against the plan."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu_check.part import Part, WrongFigureError
from benchmarks.gpu_check.programs import Finished, Program
from benchmarks.harness.outcome import LEFT_OUT
from benchmarks.harness.record import Row
from benchmarks.harness.workload import build_config
from benchmarks.table import one_gpu
from benchmarks.table.bench import TOY_SIZES, Bench, build_bench, predict_row, read_published_model
from benchmarks.table.options import parse_options
from benchmarks.table.rows import ROWS, TRANSFORMERS
from benchmarks.table.rows import Row as TableRow
from benchmarks.table.runs import find_unsupported_reason
from megablocks_utils.planning.model.units import format_gb
from megablocks_utils.rehearsal.worker import build_request

_TIMEOUT_S = 180.0
_MOST_ERROR = 0.1
"""The plan's peak may differ from the measured one by this share."""
_DRY_ROWS = ("full-ep8-triton",)


def run(part: Part) -> None:
    """Measure the rows of the table that can be rehearsed, each in a process of its own."""
    bench = _build_bench(part)
    folder = part.scratch / "model"
    build_config(bench.config).save_pretrained(folder)
    rows = [row for row in ROWS if row.group != TRANSFORMERS]
    rows = [row for row in rows if not part.is_dry or row.name in _DRY_ROWS]
    programs = []
    for row in rows:
        unsupported = None if part.is_dry else _find_unsupported(row, bench)
        if unsupported is None:
            programs.append(_program(part, row, bench, folder))
        elif part.is_wanted(row.name):
            part.add({"name": row.name} | unsupported)
    by_name = {row.name: row for row in rows}
    part.run(programs, lambda done: _read(done, bench, by_name[done.program.name], part))


def compare(peak_bytes: int, predicted_bytes: int) -> Row:
    """Compare a measured peak with the plan's.

    Raises:
        WrongFigureError: they differ by more than is allowed.
    """
    error = predicted_bytes / peak_bytes - 1
    found = {"predicted_peak_bytes": predicted_bytes, "error": error}
    if abs(error) > _MOST_ERROR:
        reason = f"the plan's peak is off by {error:+.1%}, but it may be {_MOST_ERROR:.0%}"
        raise WrongFigureError(reason, found | {"peak_bytes": peak_bytes})
    return found


def _find_unsupported(row: TableRow, bench: Bench) -> Row | None:
    """Return why a row cannot be measured here; None if it can."""
    prediction = predict_row(bench, row)
    assert prediction is not None, row.name
    needed, there = prediction["peak_bytes"], torch.cuda.get_device_properties(0).total_memory
    if needed > there:
        reason = f"the plan's {format_gb(needed)} are more than this GPU's {format_gb(there)}"
        return {"status": LEFT_OUT, "reason": reason}
    return find_unsupported_reason(row, bench)


def _build_bench(part: Part) -> Bench:
    bench = build_bench(parse_options(["--one_gpu"]))
    if not part.is_dry:
        return bench
    sizes = {**read_published_model(), **TOY_SIZES, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    return replace(bench, config=sizes, tokens=16, device_type="cpu", precision="fp32")


def _program(part: Part, row: TableRow, bench: Bench, folder: Path) -> Program:
    scenario = bench.scenario(row)
    return Program(
        row.name,
        ("-m", one_gpu.MODULE),
        _TIMEOUT_S,
        hides_gpu=part.is_dry,
        stdin=build_request(folder, scenario.own_layout(), scenario.planned_run()),
    )


def _read(finished: Finished, bench: Bench, row: TableRow, part: Part) -> Row:
    held = json.loads(finished.output().splitlines()[-1])
    prediction = predict_row(bench, row)
    assert prediction is not None, row.name
    if part.is_dry:  # resident memory of a process, most of it no tensor's
        return held
    return held | compare(held["peak_bytes"], prediction["peak_bytes"])
