"""What a run that goes on from a checkpoint in another layout has in common with one that did not.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m benchmarks.reshard

Every layout of both scripts trains 8 steps and saves after the third; every other one, and itself,
goes on from there. Compared are weights and both of Adam's moments right after loading with those
at the moment of saving, whole and element by element, and the next 5 losses and gradient norms with
those of the run that was not interrupted. About two minutes on two cores. Writes
benchmarks/results/reshard.json and prints tables. Ends with exit code 1 if a bound does not hold.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.certificate import build_certificate
from benchmarks.parity import BOUND, open_workplace, say
from megablocks_utils.training.atomic_file import write_json_atomically
from megablocks_utils.training.metrics import StepMetrics
from tests.support.parity import Layout, ParityFolder
from tests.support.rank_pool import RankPool
from tests.support.resuming import (
    SAVED_STEP,
    ResumedRun,
    Run,
    SavedRun,
    make_run,
    resume,
    run_and_save,
)

RESULTS = Path(__file__).parent / "results" / "reshard.json"
MODEL = "mixtral, wide"  # odd sizes: flat shards of FSDP1 end within rows
RUNS = (
    *(
        make_run("fsdp2", layout, model=MODEL)
        for layout in (
            Layout(1, 0),
            Layout(2, 2),
            Layout(4, 2, "shard"),
            Layout(4, 2, "replicate"),
            Layout(4, 4),
        )
    ),
    make_run("fsdp1", Layout(2, 2, "replicate"), model=MODEL),
    make_run("fsdp1", Layout(4, 2, "replicate"), model=MODEL),
)
STATES = {"weight": "", "exp_avg": ".exp_avg", "exp_avg_sq": ".exp_avg_sq", "step": ".step"}
"""What is kept -> the end of its names in a checkpoint."""


def describe(run: Run) -> str:
    """Name script and layout."""
    return f"{run.script} {run.layout}"


def measure_rows(pools: Mapping[int, RankPool], models: ParityFolder) -> list[dict[str, Any]]:
    """Save in every layout, go on in every layout; return a row for each pair."""
    numbers = count()
    rows = []
    for source in RUNS:
        saved = run_and_save(pools, models, source, models.folder / f"run-{next(numbers)}")
        for target in RUNS:
            folder = models.folder / f"run-{next(numbers)}"
            resumed = resume(pools, models, target, saved.checkpoint, folder)
            rows.append(compare(saved, target, resumed))
            say(f"{describe(source)} -> {describe(target)}: loss {rows[-1]['loss']:.1e}")
    return rows


def compare(saved: SavedRun, target: Run, resumed: ResumedRun) -> dict[str, Any]:
    """Return a row: largest absolute errors of what was loaded, relative ones of the next steps."""
    if resumed.state.keys() != saved.state.keys():
        raise RuntimeError(f"other tensors: {resumed.state.keys() ^ saved.state.keys()}")
    errors = {
        f"{kind}_error": max(
            _largest_error(resumed.state[name], wanted)
            for name, wanted in saved.state.items()
            if _kind(name) == kind
        )
        for kind in STATES
    }
    pairs = list(zip(resumed.metrics, saved.metrics, strict=True))[SAVED_STEP:]
    return {
        "saved_at": describe(saved.run),
        "loaded_at": describe(target),
        **errors,
        "steps": [ours.step for ours, _ in pairs],
        "losses": [ours.loss for ours, _ in pairs],
        "uninterrupted_losses": [wanted.loss for _, wanted in pairs],
        "loss": _relative(pairs, lambda step: step.loss),
        "grad_norm": _relative(pairs, lambda step: step.grad_norm),
    }


def _kind(name: str) -> str:
    return next((kind for kind, end in STATES.items() if end and name.endswith(end)), "weight")


def _largest_error(ours: Tensor, wanted: Tensor) -> float:
    return (ours.double() - wanted.double()).abs().max().item()


def _relative(
    pairs: list[tuple[StepMetrics, StepMetrics]], number: Callable[[StepMetrics], float]
) -> float:
    return max(abs(number(ours) / number(wanted) - 1) for ours, wanted in pairs)


def build_tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """Yield tables of all pairs: errors of what was loaded, differences of the next losses."""
    columns = list(dict.fromkeys(row["loaded_at"] for row in rows))
    cells = {
        "largest error of weights and both moments after loading": lambda row: max(
            row[f"{kind}_error"] for kind in STATES
        ),
        "largest relative difference of the next 5 losses": lambda row: row["loss"],
    }
    for title, cell in cells.items():
        table = Table("saved at", *columns, title=title)
        for source in dict.fromkeys(row["saved_at"] for row in rows):
            values = [cell(row) for row in rows if row["saved_at"] == source]
            table.add_row(source, *(f"{value:.1e}" if value else "0" for value in values))
        yield table


def find_violations(rows: list[dict[str, Any]]) -> list[str]:
    """Name every row that is not exact, or further than the bound from the uninterrupted run."""
    broken = []
    for row in rows:
        bound = 0.0 if row["saved_at"] == row["loaded_at"] else BOUND
        is_exact = not any(row[f"{kind}_error"] for kind in STATES)
        if not is_exact or max(row["loss"], row["grad_norm"]) > bound:
            broken.append(f"reshard: {row}")
    return broken


def main() -> None:
    """Measure, write, show, judge."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()  # --help, no options
    started = time.monotonic()
    with open_workplace(1, 2, 4) as (pools, folder):
        rows = measure_rows(pools, folder)
    runtime_s = round(time.monotonic() - started)
    certificate = build_certificate(
        "benchmarks.reshard", sys.argv[1:], runtime_s=runtime_s, model=MODEL, saved_step=SAVED_STEP
    )
    RESULTS.parent.mkdir(exist_ok=True)
    write_json_atomically(RESULTS, certificate | {"rows": rows})
    console = Console(width=140)
    for table in build_tables(rows):
        console.print(table)
    violations = find_violations(rows)
    for violation in violations:
        say(violation)
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
