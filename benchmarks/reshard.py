"""How exactly a run resumes from a checkpoint in another layout: every layout to every other.

    PYTHONPATH=. python -m benchmarks.reshard [--composed | --axes] [--saved LAYOUT ...]

Saves a tiny Mixtral after 3 of 8 steps of full fine-tuning in each layout, and resumes from there
in each layout; about five minutes on two cores. With `--composed`, in layouts of several mesh axes
at once; with `--axes`, of a model that these shard unevenly. Writes benchmarks/results/reshard.json
(reshard_composed.json, reshard_axes.json) and prints it as Markdown. Ends with exit code 1 if a
weight or moment differs at all, a run resumed in the same layout is not bit-equal to the
uninterrupted one, or another one exceeds the bound.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Mapping

from torch import Tensor

from benchmarks.harness.provenance import RESULTS, build_provenance
from benchmarks.harness.rank_pools import finish, open_rank_pools
from benchmarks.harness.record import Record, Row
from benchmarks.harness.report import markdown_table, say
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
COMPOSED = {
    "1 rank": RUNS["1 rank"],
    "hsdp2 ep2": make_run("fsdp2", Layout(4, 2, groups=2)),
    "ep2 etp2": make_run("fsdp2", Layout(4, 2, expert_tp_size=2)),
    "tp2 ep2": make_run("fsdp2", Layout(4, 2, tp_size=2)),
    "sp2 ep2": make_run("fsdp2", Layout(4, 2, sp_size=2)),
    "sp2 tp2 ep2": make_run("fsdp2", Layout(4, 2, sp_size=2, tp_size=2)),
    "sp2 etp2": make_run("fsdp2", Layout(4, 1, sp_size=2, expert_tp_size=2)),
    "tp2 etp2": make_run("fsdp2", Layout(4, 1, tp_size=2, expert_tp_size=2)),
    "hsdp2 ep2 etp2": make_run("fsdp2", Layout(8, 2, groups=2, expert_tp_size=2)),
    "sp2 ep2 hsdp2": make_run("fsdp2", Layout(8, 2, groups=2, sp_size=2)),
}
# Half of the words is an odd number, so that FSDP shards unevenly what tensor parallelism splits.
UNEVEN = {"model": "mixtral, odd half of the words"}
AXES = {
    "1 rank": make_run("fsdp2", Layout(1, 1), **UNEVEN),
    "4 ep2": make_run("fsdp2", Layout(4, 2), **UNEVEN),
    "hsdp2 ep2": make_run("fsdp2", Layout(4, 2, groups=2), **UNEVEN),
    "etp2 ep2": make_run("fsdp2", Layout(4, 2, expert_tp_size=2), **UNEVEN),
    "tp2 ep2": make_run("fsdp2", Layout(4, 2, tp_size=2), **UNEVEN),
    "tp2 ep4": make_run("fsdp2", Layout(4, 4, tp_size=2), **UNEVEN),
    "sp2 ep2": make_run("fsdp2", Layout(4, 2, sp_size=2), **UNEVEN),
}
SETS = {"reshard": RUNS, "reshard_composed": COMPOSED, "reshard_axes": AXES}
"""Layouts by the name of the result."""


def measure(
    pools: Mapping[int, RankPool],
    models: ParityFolder,
    runs: Mapping[str, Run],
    sources: Iterable[str],
) -> list[Row]:
    """Save in each of the sources and resume in all; return a row for each pair."""
    rows = []
    for source in sources:
        run = runs[source]
        saved = run_and_save(pools, models, run, models.folder / f"saved {source}")
        for target, other in runs.items():
            rows.append(measure_pair(pools, models, saved, run.on(other)))
            rows[-1] = {"saved": source, "resumed": target} | rows[-1]
            say(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
    return rows


def measure_pair(
    pools: Mapping[int, RankPool], models: ParityFolder, saved: SavedRun, run: Run
) -> Row:
    """Resume a saved run as another; return the largest differences."""
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


def format_table(rows: list[Row]) -> str:
    """Return the differences of the next losses as Markdown, and the errors of the state."""
    names, targets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("saved", "resumed"))
    losses = {(row["saved"], row["resumed"]): row["loss"] for row in rows}
    lines = [
        [source, *(f"{losses[source, target]:.1e}".replace("0.0e+00", "0") for target in targets)]
        for source in names
    ]
    table = markdown_table(("saved \\ resumed", *targets), lines)
    worst = ", ".join(f"{name} {max(row[name] for row in rows):g}" for name in ERRORS)
    return f"{table}\n\nLargest error of the restored state, all {len(rows)} pairs: {worst}."


def find_violations(rows: list[Row]) -> list[str]:
    """Name every pair that breaks its bound."""
    violations = []
    for row in rows:
        bound = 0.0 if row["saved"] == row["resumed"] else BOUND
        if any(row[name] for name in ERRORS) or max(row["loss"], row["grad_norm"]) > bound:
            violations.append(str(row))
    return violations


def main() -> None:
    """Measure, write, show, judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--composed", action="store_true", help="several mesh axes at once")
    parser.add_argument("--saved", nargs="+", help="layouts to save in; other rows stay")
    parser.add_argument("--axes", action="store_true", help="further axes, uneven shards")
    given = parser.parse_args()
    name = "reshard_composed" if given.composed else "reshard_axes" if given.axes else "reshard"
    runs, result = SETS[name], RESULTS / f"{name}.json"
    sources = [name for name in runs if given.saved is None or name in given.saved]
    known = [] if given.saved is None else Record.read(result).rows
    started = time.monotonic()
    with open_rank_pools(*{run.layout.world_size for run in runs.values()}) as (pools, models):
        rows = measure(pools, models, runs, sources)
    rows = [row for row in known if row["saved"] not in sources] + rows
    runtime_s = round(time.monotonic() - started)
    provenance = build_provenance("benchmarks.reshard", sys.argv[1:], runtime_s=runtime_s)
    finish(result, provenance | {"rows": rows}, format_table(rows), find_violations(rows))


if __name__ == "__main__":
    main()
