"""Memory and time of loading a model on 1, 2 and 4 ranks: ours, and transformers' own ways.

    PYTHONPATH=. python -m benchmarks.load

Every load has fresh processes. Peak memory is the kernel's high-water mark of each process, reset
right before the load. The weights' files are in the page cache for all contenders.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from benchmarks.harness.processes import run_ranks
from benchmarks.harness.provenance import RESULTS, build_provenance
from benchmarks.harness.record import Record, Row
from benchmarks.harness.report import format_spread, markdown_table, show
from benchmarks.harness.timing import in_turn, spread
from benchmarks.harness.workload import Workload, save_data, save_model
from benchmarks.load.contenders import CONTENDERS, OURS, Job, measure_load
from megablocks_utils.checkpoint.index import open_checkpoint

RESULT = RESULTS / "load.json"
SLACK = 1.25
_MB = 1e6
_COLUMNS = (
    *("ranks", "side", "peak, MB", "bare process", "own part", "bound", "within bound", "seconds"),
)


@dataclass(frozen=True)
class Plan:
    """What to load, by how many ranks, and how often.

    Attributes:
        workload: the model's sizes.
        shard_size: of its files.
        world_sizes: numbers of ranks; ep is as many.
        repetitions: loads by each contender on each number of ranks.
        sides: of `CONTENDERS`.
    """

    workload: Workload
    shard_size: str
    world_sizes: tuple[int, ...]
    repetitions: int
    sides: tuple[str, ...] = CONTENDERS


FULL = Plan(
    Workload(
        hidden_size=1024,
        intermediate_size=3584,
        num_layers=8,
        num_experts=8,
        vocab_size=32000,
        num_examples=64,
        num_attention_heads=16,
    ),
    shard_size="300MB",
    world_sizes=(1, 2, 4),
    repetitions=3,
)
SMOKE = Plan(
    Workload(64, 96, 2, vocab_size=128, num_examples=64, num_attention_heads=16),
    shard_size="200KB",
    world_sizes=(2,),
    repetitions=1,
    sides=OURS,
)


def measure_all(plan: Plan, folder: Path) -> Iterator[list[Row]]:
    """Load with every contender on every number of ranks; yield a row for each, turn by turn.

    The rows of a turn hold the loads of all turns so far.
    """
    largest = _largest_tensor_bytes(folder / "model")
    cases = [(world_size, name) for world_size in plan.world_sizes for name in plan.sides]
    found: dict[tuple[int, str], list[Any]] = {case: [] for case in cases}
    for turn in range(plan.repetitions):
        for world_size, name in in_turn(cases, turn):
            found[world_size, name].append(_measure(Job(name, world_size, folder)))
        yield [build_row(*case, results, largest) for case, results in found.items()]


def build_row(world_size: int, side: str, results: Sequence[Any], largest_bytes: int) -> Row:
    """Sum up the loads of one contender on one number of ranks.

    The bound of a rank is 1.25 times its own part, the largest stored tensor and the bare process.

    Args:
        world_size: ranks.
        side: one of `CONTENDERS`.
        results: of each load what its ranks returned, or the text of an error.
        largest_bytes: of the largest tensor in the files.
    """
    row: Row = {"world_size": world_size, "side": side}
    errors = [result for result in results if isinstance(result, str)]
    if errors:
        return row | {"error": errors[0], "failed": f"{len(errors)} of {len(results)}"}
    for key in ("peak_bytes", "bare_bytes", "own_bytes", "seconds"):
        row[key] = spread([max(rank[key] for rank in ranks) for ranks in results])
    bounds = [[_bound(rank, largest_bytes) for rank in ranks] for ranks in results]
    row["bound_bytes"] = spread([max(ranks) for ranks in bounds])
    row["is_within_bound"] = all(
        rank["peak_bytes"] <= bound
        for ranks, its_bounds in zip(results, bounds, strict=True)
        for rank, bound in zip(ranks, its_bounds, strict=True)
    )
    return row | {"rounds": list(results)}


def format_table(rows: list[Row]) -> str:
    """Return the rows as Markdown: of each load the worst rank; medians, and the range."""
    lines = [[str(row["world_size"]), row["side"], *_cells(row)] for row in rows]
    return markdown_table(_COLUMNS, lines, 2)


def main(argv: list[str]) -> None:
    """Make the model, measure, write after each turn, show."""
    options = _parse(argv)
    plan = SMOKE if options.smoke else FULL
    output = options.output or (None if options.smoke else RESULT)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(
            plan.workload.build_config(),
            folder / "model",
            dtype=torch.bfloat16,
            max_shard_size=plan.shard_size,
        )
        save_data(plan.workload, folder / "data.jsonl")
        settings = _describe(plan, folder / "model")
        for rows in measure_all(plan, folder):
            provenance = build_provenance("benchmarks.load", argv, **settings)
            Record(output, provenance | {"rows": rows}).write()
    show(format_table(rows))


def _measure(job: Job) -> list[dict[str, float]] | str:
    try:
        return run_ranks(measure_load, job.world_size, job)
    except (ProcessRaisedException, ProcessExitedException) as error:
        return str(error).strip().splitlines()[-1]


def _bound(rank: dict[str, float], largest_bytes: int) -> float:
    return SLACK * rank["own_bytes"] + largest_bytes + rank["bare_bytes"]


def _largest_tensor_bytes(folder: Path) -> int:
    index = open_checkpoint(folder)
    return max(math.prod(index.shape(key)) * index.dtype(key).itemsize for key in index)


def _describe(plan: Plan, folder: Path) -> dict[str, Any]:
    return {
        "plan": asdict(plan),
        "dtype": "bfloat16",
        "threads": 1,
        "model_bytes": open_checkpoint(folder).total_bytes,
        "largest_tensor_bytes": _largest_tensor_bytes(folder),
        "num_files": len(list(folder.glob("*.safetensors"))),
        "method": {
            "peak_bytes": "VmHWM of /proc/self/status, reset through /proc/self/clear_refs right "
            "before the load",
            "bare_bytes": "VmRSS at that moment",
            "seconds": "until the last rank is ready for its first step; files in the page cache",
            "bound_bytes": f"{SLACK} x own part + largest stored tensor + bare process",
            "spread": "over the loads, of each the worst rank",
        },
    }


def _cells(row: Row) -> list[str]:
    if "error" in row:
        return [f"failed: {row['error']}", *[""] * 5]
    own = [f"{row[key]['median'] / _MB:.0f}" for key in ("bare_bytes", "own_bytes")]
    bound = [f"{row['bound_bytes']['median'] / _MB:.0f}", "yes" if row["is_within_bound"] else "no"]
    return [
        format_spread(row["peak_bytes"], 0, unit=_MB),
        *own,
        *(bound if row["side"] in OURS else ("", "")),
        format_spread(row["seconds"], 1),
    ]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help=f"the JSON file (default: {RESULT.name})")
    parser.add_argument("--smoke", action="store_true", help="tiny, and no file unless --output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
