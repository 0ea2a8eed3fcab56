"""Run the rows: each in fresh processes, in turns, every result kept as it comes."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.launchers import FSDP2_SCRIPT, Job
from benchmarks.harness.outcome import LEFT_OUT, MEASURED, NOT_INSTALLED, Ending, explain
from benchmarks.harness.timing import in_turn
from benchmarks.table.bench import Bench
from benchmarks.table.rows import TRANSFORMERS, Row
from megablocks_utils.files import METRICS_NAME, RUN_RECORD_NAME
from megablocks_utils.kernels.backends.backend_table import BACKENDS
from megablocks_utils.training.report.metrics import read_metrics

Launch = Callable[[Job], Ending]

_STOCK = ("-m", "benchmarks.table.stock")
_TIMEOUT_S = {"cpu": 300.0, "cuda": 3600.0}
_MEMORY_STEPS = 2


@dataclass(frozen=True)
class RunPaths:
    """Where runs read and write.

    Attributes:
        model: folder or Hub name.
        data: file of examples.
        scratch: folder for what runs leave, each removed when it has been read.
    """

    model: str
    data: Path
    scratch: Path


def find_unsupported_reason(
    row: Row, bench: Bench, earlier: Sequence[Row] = ()
) -> dict[str, Any] | None:
    """Return why a row cannot be run at all; None if it can.

    Args:
        row: which.
        bench: how.
        earlier: rows before it, of which it may be a copy where one backend runs them all.
    """
    if row.ep_share and row.ep_size(bench.ranks) == 1:
        return {"status": LEFT_OUT, "reason": "ep would be 1: this layout needs more ranks"}
    if bench.device_type == "cpu":
        return _find_copy(row, bench, earlier)
    backend = BACKENDS.get(row.kernel)
    if row.ep_share and backend is not None and not backend.is_installed():
        reason = f"{row.kernel} is not installed; install it with: {backend.install}"
        return {"status": NOT_INSTALLED, "reason": reason}
    return None


def _find_copy(row: Row, bench: Bench, earlier: Sequence[Row]) -> dict[str, Any] | None:
    def what_runs(one: Row) -> tuple:
        return (one.group == TRANSFORMERS, one.use_lora, bench.scenario(one).own_layout())

    for other in earlier:
        if what_runs(other) == what_runs(row):
            is_ours = row.kernel == "triton"
            why = "needs a GPU (its interpreter is no timing)" if is_ours else "needs a GPU"
            reason = f"{row.kernel} {why}; with grouped_mm this is {other.name}"
            return {"status": LEFT_OUT, "reason": reason}
    return None


def take_rounds(
    rows: Sequence[Row], rounds: int, run: Callable[[Row], dict[str, Any]]
) -> Mapping[str, list[dict[str, Any]]]:
    """Run every row once a round, in an order that alternates from one to the next.

    A row that could not be measured is not tried again.

    Returns:
        The results of each row by its name.
    """
    results: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for turn in range(rounds):
        for row in in_turn(rows, turn):
            if all(one["status"] == MEASURED for one in results[row.name]):
                results[row.name].append(run(row))
    return results


def run_row(
    row: Row, bench: Bench, paths: RunPaths, launch: Launch, *, steps: int | None = None
) -> dict[str, Any]:
    """Run a row once, in fresh processes, and return its numbers or why there are none.

    Args:
        row: which.
        bench: how.
        paths: where.
        launch: starts the processes.
        steps: in all; None: as the bench has them.
    """
    program = _STOCK if row.group == TRANSFORMERS else FSDP2_SCRIPT
    folder = Path(tempfile.mkdtemp(dir=paths.scratch))
    output_dir, logs = folder / "output", folder / "logs"
    logs.mkdir()
    options = bench.arguments(row, steps=steps) | {
        "model_name_or_path": paths.model,
        "data_path": paths.data,
        "output_dir": output_dir,
    }
    job = Job(program, options, bench.ranks, logs, _TIMEOUT_S[bench.device_type])
    try:
        ending = launch(job)
        if ending.exit_code != 0:
            return explain(ending)
        warmup = bench.warmup_steps if steps is None else steps - 1
        found = read_run(
            output_dir, warmup_steps=warmup, accumulation=bench.accumulation, ranks=bench.ranks
        )
        return found | {"load_average": round(os.getloadavg()[0], 2)}
    finally:
        shutil.rmtree(folder)


def measure_row_memory(
    row: Row, bench: Bench, paths: RunPaths, toy: RunPaths, launch: Launch
) -> dict[str, Any]:
    """Measure resident memory on a CPU: of a row's processes, and of the same row with a toy model.

    The second is what Python, libraries and connections take: the base to which a prediction, which
    knows of tensors only, is added.

    Returns:
        `peak_bytes`, `allocated_bytes`, `base_peak_bytes` and `base_allocated_bytes`; or why there
        are none.
    """
    whole, base = (
        run_row(row, bench, where, launch, steps=_MEMORY_STEPS) for where in (paths, toy)
    )
    for found in (whole, base):
        if found["status"] != MEASURED:
            return found
    keys = ("peak_bytes", "allocated_bytes")
    held = {key: whole[key] for key in keys} | {f"base_{key}": base[key] for key in keys}
    return {"status": MEASURED} | held


def read_run(folder: Path, *, warmup_steps: int, accumulation: int, ranks: int) -> dict[str, Any]:
    """Read the numbers of a run that succeeded.

    Args:
        folder: its `--output_dir`, with metrics.jsonl and run.json.
        warmup_steps: steps that are not counted in times.
        accumulation: micro-steps of a step.
        ranks: processes.

    Returns:
        `micro_step_s` and `tokens_per_s` (all ranks) of every measured step, `tokens_per_rank` of a
        micro-step; `peak_bytes` since the start and `allocated_bytes` after zero_grad, of the rank
        that had most; `first_loss`; `mesh` and `kernel`, as the run had them.
    """
    steps = read_metrics(folder / METRICS_NAME)
    record = json.loads((folder / RUN_RECORD_NAME).read_text(encoding="utf-8"))
    measured = steps[warmup_steps:]
    return {
        "status": MEASURED,
        "micro_step_s": [step.step_time_s / accumulation for step in measured],
        "tokens_per_s": [step.tokens_per_s for step in measured],
        "tokens_per_rank": measured[0].input_tokens // (accumulation * ranks),
        "peak_bytes": max(step.mem_peak_bytes for step in steps),
        "allocated_bytes": max(step.mem_alloc_bytes for step in measured),
        "first_loss": steps[0].loss,
        "mesh": record["mesh"],
        "kernel": record["kernel"]["name"],
    }
