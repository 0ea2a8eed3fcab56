"""Run the rows: each in fresh processes, in turns, every result kept as it comes."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.launchers import OURS, STOCK, Ending, Job
from benchmarks.table.bench import Bench
from benchmarks.table.outcome import LEFT_OUT, MEASURED, NOT_INSTALLED, explain, read_run
from benchmarks.table.rows import TRANSFORMERS, Row
from megablocks_utils.kernels.megablocks import MEGABLOCKS_INSTALL, is_megablocks_installed
from megablocks_utils.kernels.scattermoe import SCATTERMOE_INSTALL, is_scattermoe_installed

__all__ = ["Launch", "Workplace", "find_unsupported_reason", "run_row", "take_rounds", "weigh_row"]

Launch = Callable[[Job], Ending]

_TIMEOUT_S = {"cpu": 300.0, "cuda": 3600.0}
_WEIGHED_STEPS = 2


@dataclass(frozen=True)
class Workplace:
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
    """Say what keeps a row from being run at all; None if nothing does.

    Args:
        row: which.
        bench: how.
        earlier: rows before it, of which it may be a copy where one backend runs them all.
    """
    if row.ep_share and row.ep_size(bench.ranks) == 1:
        return {"status": LEFT_OUT, "reason": "ep would be 1: this layout needs more ranks"}
    if bench.device_type == "cpu":
        return _find_copy(row, bench, earlier)
    packages = {
        "megablocks": (is_megablocks_installed, MEGABLOCKS_INSTALL),
        "scattermoe": (is_scattermoe_installed, SCATTERMOE_INSTALL),
    }
    is_installed, install = packages.get(row.kernel, (lambda: True, ""))
    if row.ep_share and not is_installed():
        reason = f"{row.kernel} is not installed; install it with: {install}"
        return {"status": NOT_INSTALLED, "reason": reason}
    return None


def _find_copy(row: Row, bench: Bench, earlier: Sequence[Row]) -> dict[str, Any] | None:
    def what_runs(one: Row) -> tuple:
        return (one.side == TRANSFORMERS, one.use_lora, bench.scenario(one).own_layout())

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
    """Run every row once a round, in an order that turns round from one to the next.

    A row that could not be measured is not tried again.

    Returns:
        What the runs of each row came to, by its name, as a view that grows.
    """
    seen: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for turn in range(rounds):
        for row in rows if turn % 2 == 0 else list(reversed(rows)):
            if all(result["status"] == MEASURED for result in seen[row.name]):
                seen[row.name].append(run(row))
    return seen


def run_row(
    row: Row, bench: Bench, place: Workplace, launch: Launch, *, steps: int | None = None
) -> dict[str, Any]:
    """Run a row once, in fresh processes, and return its numbers or why there are none.

    Args:
        row: which.
        bench: how.
        place: where.
        launch: starts the processes.
        steps: in all; None: as the bench has them.
    """
    program = STOCK if row.side == TRANSFORMERS else OURS
    folder = Path(tempfile.mkdtemp(dir=place.scratch))
    output_dir, logs = folder / "output", folder / "logs"
    logs.mkdir()
    options = bench.arguments(row, steps=steps) | {
        "model_name_or_path": place.model,
        "data_path": place.data,
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


def weigh_row(
    row: Row, bench: Bench, place: Workplace, toy: Workplace, launch: Launch
) -> dict[str, Any]:
    """Weigh a row on a CPU: resident memory of its processes, and of the same row with a toy model.

    The second is what Python, libraries and connections take: the base to which a prediction, which
    knows of tensors only, is added.

    Returns:
        `peak_bytes`, `allocated_bytes`, `base_peak_bytes` and `base_allocated_bytes`; or why there
        are none.
    """
    whole, base = (
        run_row(row, bench, where, launch, steps=_WEIGHED_STEPS) for where in (place, toy)
    )
    for found in (whole, base):
        if found["status"] != MEASURED:
            return found
    keys = ("peak_bytes", "allocated_bytes")
    weights = {key: whole[key] for key in keys} | {f"base_{key}": base[key] for key in keys}
    return {"status": MEASURED} | weights
