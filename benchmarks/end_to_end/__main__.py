"""Training steps of our script against an earlier revision of it, transformers' own, and PEFT.

    PYTHONPATH=. python -m benchmarks.end_to_end --baseline c79345c [--shape packed]

Every system has processes of its own, and all systems of a case live at once and take turns, so
that whatever else the machine does hits all of them. Before anything is timed, the tokens of the
first steps must be the same and their losses equal within a bound. Each case is a row.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.end_to_end.cases import OURS, build_systems, count_tokens, list_cases
from benchmarks.end_to_end.measure import LOSS_BOUNDS, Machine, Plan, measure, summarise
from benchmarks.end_to_end.settings import Case
from benchmarks.harness.case import has_words
from benchmarks.harness.provenance import RESULTS, ROOT, build_provenance
from benchmarks.harness.record import Record, Row
from benchmarks.harness.report import format_spread, markdown_table, show
from benchmarks.harness.workload import Workload, save_workload
from megablocks_utils.byte_units import MIB

_SHORT = Workload(num_layers=3)
_WORKLOADS = {
    "short": _SHORT,
    "packed": Workload(
        num_layers=1,
        num_examples=256,
        shortest_tokens=512,
        longest_tokens=512,
        per_device_batch=16,
    ),
}
_SHAPES = "micro-batches of 4 examples of 16 to 192 tokens, or 16 of 512 tokens packed in a row"
_PRECISION_ON = {"cpu": "fp32", "cuda": "bf16"}
_COLUMNS = ("system", "tokens/s", "time / ours", "CPU time / ours", "peak MiB", "peak / ours")


def main(argv: list[str]) -> None:
    """Run the cases; after each, write its row in place of an older one of the same case."""
    options = _parse(argv)
    # Fork after the libraries are imported: they must not ask CUDA itself what there is.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    plan = Plan(options.runs, options.rounds, options.steps_per_turn, options.warmup_steps)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = "end_to_end" if options.shape == "short" else f"end_to_end_{options.shape}"
    path = Path(options.output or RESULTS / f"{name}_{device}.json")
    is_added_to = bool(options.only) and path.exists()
    record = Record.read(path) if is_added_to else Record(path, {})
    with tempfile.TemporaryDirectory() as name, _checkout(options.baseline) as tree:
        workload = _WORKLOADS[options.shape]
        save_workload(workload, Path(name))
        for case in list_cases(options.ranks, _PRECISION_ON[device]):
            if has_words(case.label(), options.only):
                row = run_case(case, plan, Path(name), tree, argv, workload=workload)
                record.add(row, "case")
                show(build_table(row))


def run_case(
    case: Case,
    plan: Plan,
    folder: Path,
    tree: Path | None,
    argv: list[str],
    *,
    workload: Workload = _SHORT,
) -> Row:
    """Measure the systems of a case and return its row.

    Args:
        case: which.
        plan: how long.
        folder: with the workload's model and data.
        tree: checkout of the revision to compare with; None: there is none.
        argv: the command line, for the record.
        workload: what is trained.
    """
    specs = build_systems(case, workload, folder, tree, max_steps=plan.max_steps)
    machine = Machine(case.world_size, workload.vocab_size, case.precision)
    result = measure(specs, machine, plan)
    tokens = count_tokens(specs[0].argv, case.world_size)[plan.warmup_steps :]
    size = plan.steps_per_turn
    turns = [sum(tokens[place * size : (place + 1) * size]) for place in range(plan.rounds)]
    settings = {
        "workload": asdict(workload),
        "plan": asdict(plan),
        "baseline_commit": None if tree is None else _read_commit(tree),
        "loss_bound": LOSS_BOUNDS[case.precision],
        "peak": "resident memory since the start, above that of the libraries, all ranks"
        if case.precision == "fp32"
        else "torch.cuda.max_memory_allocated, all ranks",
    }
    provenance = build_provenance("benchmarks.end_to_end", argv)
    row = (
        {"case": asdict(case)} | provenance | settings | summarise(result, turns * plan.runs, OURS)
    )
    return row | {"tokens_per_turn": turns, "rounds": result}


def build_table(row: Row) -> str:
    """Return the table of a case."""
    lines = []
    for name, rate in row["tokens_per_s"].items():
        ratios = [
            format_spread(row[key][name], is_bold=True) if name in row[key] else "1"
            for key in ("ratio", "ratio_of_cpu_time", "ratio_of_peak")
        ]
        peak = format_spread(row["peak_bytes"][name], 0, unit=MIB)
        lines.append((name, format_spread(rate, 0), *ratios[:2], peak, ratios[2]))
    return f"{Case(**row['case']).label()}\n\n{markdown_table(_COLUMNS, lines)}\n"


@contextmanager
def _checkout(revision: str | None) -> Iterator[Path | None]:
    """Yield a worktree of a revision of this repository, which is removed again."""
    if revision is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name, "tree")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def _read_commit(tree: Path) -> str:
    command = ["git", "-C", str(tree), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _parse(argv: list[str]) -> argparse.Namespace:
    plan = Plan()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--baseline", metavar="REV", help="a revision whose script is a system, too")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4], choices=(1, 2, 4))
    add("--runs", type=int, default=plan.runs, help="how often the processes are started")
    add("--rounds", type=int, default=plan.rounds, help="turns of each system in a run")
    add("--steps-per-turn", type=int, default=plan.steps_per_turn)
    add("--warmup-steps", type=int, default=plan.warmup_steps, help="compared, not timed")
    add("--shape", choices=_WORKLOADS, default="short", help=_SHAPES)
    add("--only", default="", help="cases whose label holds all these words")
    add("--output", help="the JSON file; with --only, rows of other cases are kept")
    options = parser.parse_args(argv)
    for name in ("runs", "rounds", "steps_per_turn", "warmup_steps"):
        value = getattr(options, name)
        if value < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} is {value}, but it must be a whole number of at least 1")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
