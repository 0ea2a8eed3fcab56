"""How exactly a run goes on from a checkpoint in another layout: every layout to every other.

    PYTHONPATH=. python -m benchmarks.reshard

Saves a tiny Mixtral after 3 of 8 steps of full fine-tuning in each layout, and goes on from there
in each other and in itself; about five minutes on two cores. Writes benchmarks/results/reshard.json
and prints it as Markdown. Ends with exit code 1 if a weight or moment differs at all, a series in
the same layout is not the uninterrupted one bit by bit, or another one leaves the bound.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.harness.provenance import build_provenance
from benchmarks.parity import open_workplace, say
from megablocks_utils.files import write_json_atomically
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
BOUND = 1e-5
ERRORS = ("weights", "exp_avg", "exp_avg_sq")
RUNS = {
    "1 rank": make_run("fsdp2", Layout(1, 1)),
    "2 ep2": make_run("fsdp2", Layout(2, 2)),
    "4 ep2 shard": make_run("fsdp2", Layout(4, 2)),
    "4 ep2 replicate": make_run("fsdp2", Layout(4, 2, "replicate")),
    "4 ep4": make_run("fsdp2", Layout(4, 4)),
    "FSDP1 2 ep2": make_run("fsdp1", Layout(2, 2, "replicate")),
    "FSDP1 4 ep2": make_run("fsdp1", Layout(4, 2, "replicate")),
    "FSDP1 4 no ep": make_run("fsdp1", Layout(4, 0, "replicate")),
}
"""Layouts by their names in the table."""


def measure(pools: Mapping[int, RankPool], models: ParityFolder) -> list[dict[str, Any]]:
    """Save in each layout and go on in all; return a row for each pair."""
    rows = []
    for source, run in RUNS.items():
        saved = run_and_save(pools, models, run, models.folder / f"saved {source}")
        for target, other in RUNS.items():
            rows.append(measure_pair(pools, models, saved, run.on(other)))
            rows[-1] = {"saved": source, "resumed": target} | rows[-1]
            say(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
    return rows


def measure_pair(
    pools: Mapping[int, RankPool], models: ParityFolder, saved: SavedRun, run: Run
) -> dict[str, Any]:
    """Go on from a saved run as another; return the largest differences."""
    folder = models.folder / f"resumed {time.monotonic_ns()}"
    resumed = resume(pools, models, run, saved.checkpoint, folder)
    return {name: largest_error(resumed.state, saved.state, name) for name in ERRORS} | {
        "loss": largest_difference(resumed, saved, "loss"),
        "grad_norm": largest_difference(resumed, saved, "grad_norm"),
    }


def largest_error(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], kind: str) -> float:
    """Return the largest absolute difference of all tensors of a kind; they must be the same."""
    names = {name for name in wanted if name.startswith("model.")}
    if kind != "weights":
        names = {name for name in wanted if name.endswith(f".{kind}")}
    assert names <= state.keys()
    return max(float((state[name] - wanted[name]).abs().max()) for name in names)


def largest_difference(resumed: ResumedRun, saved: SavedRun, name: str) -> float:
    """Return the largest relative difference of a number over the steps after the checkpoint."""
    pairs = zip(resumed.metrics[SAVED_STEP:], saved.metrics[SAVED_STEP:], strict=True)
    return max(abs(getattr(a, name) / getattr(b, name) - 1) for a, b in pairs)


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the differences of the next losses as Markdown, and the errors of the state."""
    names = list(RUNS)
    found = {(row["saved"], row["resumed"]): row["loss"] for row in rows}
    lines = ["| saved \\ resumed | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for source in names:
        cells = [f"{found[source, target]:.1e}" for target in names]
        lines.append(f"| {source} | " + " | ".join(cells).replace("0.0e+00", "0") + " |")
    worst = ", ".join(f"{name} {max(row[name] for row in rows):g}" for name in ERRORS)
    lines += ["", f"Largest error of the restored state, all {len(rows)} pairs: {worst}."]
    return "\n".join(lines) + "\n"


def find_violations(rows: list[dict[str, Any]]) -> list[str]:
    """Name every pair that is not as it must be."""
    broken = []
    for row in rows:
        bound = 0.0 if row["saved"] == row["resumed"] else BOUND
        if any(row[name] for name in ERRORS) or max(row["loss"], row["grad_norm"]) > bound:
            broken.append(str(row))
    return broken


def main() -> None:
    """Measure, write, show, judge."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()  # --help, no options
    started = time.monotonic()
    with open_workplace(1, 2, 4) as (pools, models):
        rows = measure(pools, models)
    certificate = build_provenance(
        "benchmarks.reshard", sys.argv[1:], runtime_s=round(time.monotonic() - started)
    )
    write_json_atomically(RESULTS, certificate | {"rows": rows})
    sys.stdout.write(format_table(rows))
    violations = find_violations(rows)
    for violation in violations:
        say(violation)
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
