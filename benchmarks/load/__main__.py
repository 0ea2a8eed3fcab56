"""Memory and time of loading a model on 1, 2 and 4 ranks: ours, and transformers' own ways.

    PYTHONPATH=. python -m benchmarks.load

Every load has fresh processes. Peak memory is the kernel's high-water mark of each process, begun
anew right before the load. The weights' files are in the page cache, for all sides alike.
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
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, MixtralConfig

from benchmarks.harness.provenance import build_provenance
from benchmarks.harness.timing import spread
from benchmarks.harness.workload import Workload, save_data
from benchmarks.load.contenders import OURS, SIDES, Job, measure_load
from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.files import write_json_atomically

RESULTS = Path(__file__).parents[1] / "results" / "load.json"
SLACK = 1.25
_MB = 1e6
_WIDTH = 130


@dataclass(frozen=True)
class Plan:
    """What to load, by how many ranks, and how often.

    Attributes:
        workload: the model's sizes.
        shard_size: of its files.
        world_sizes: numbers of ranks; ep is as many.
        repetitions: loads of each side by each number of ranks.
        sides: of `SIDES`.
    """

    workload: Workload
    shard_size: str
    world_sizes: tuple[int, ...]
    repetitions: int
    sides: tuple[str, ...] = SIDES


FULL = Plan(
    Workload(
        hidden_size=1024,
        intermediate_size=3584,
        num_layers=8,
        num_experts=8,
        vocab_size=32000,
        num_examples=64,
    ),
    shard_size="300MB",
    world_sizes=(1, 2, 4),
    repetitions=3,
)
SMOKE = Plan(
    Workload(hidden_size=64, intermediate_size=96, num_layers=2, vocab_size=128, num_examples=64),
    shard_size="200KB",
    world_sizes=(2,),
    repetitions=1,
    sides=OURS,
)


def save_bf16_model(plan: Plan, folder: Path) -> None:
    """Write the random model in bf16, every expert's matrices apart, in several files."""
    sizes = plan.workload
    config = MixtralConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=sizes.num_experts,
        num_experts_per_tok=sizes.top_k,
        vocab_size=sizes.vocab_size,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=plan.shard_size)


def measure_all(plan: Plan, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Load with every side on every number of ranks, and yield a row for each pair, turn by turn.

    The rows of a turn hold the loads of all turns so far.
    """
    largest = _largest_tensor_bytes(folder / "model")
    cases = [(world_size, side) for world_size in plan.world_sizes for side in plan.sides]
    seen: dict[tuple[int, str], list[Any]] = {case: [] for case in cases}
    for turn in range(plan.repetitions):
        for world_size, side in cases if turn % 2 == 0 else reversed(cases):
            seen[world_size, side].append(_measure(side, world_size, plan, folder))
        yield [build_row(*case, results, largest) for case, results in seen.items()]


def build_row(
    world_size: int, side: str, results: Sequence[Any], largest_bytes: int
) -> dict[str, Any]:
    """Sum up the loads of one side by one number of ranks.

    The bound of a rank is 1.25 times its own part, the largest stored tensor and the bare process.

    Args:
        world_size: ranks.
        side: one of `SIDES`.
        results: of each load what `measure_load` returned, or the text of an error.
        largest_bytes: of the largest tensor in the files.
    """
    row: dict[str, Any] = {"world_size": world_size, "side": side}
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


def build_table(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table: medians, with least and largest."""
    table = Table(title="Loading a model: the worst rank of each load, MB")
    for column in ("ranks", "side"):
        table.add_column(column, no_wrap=True)
    for column in ("peak", "bare process", "own part", "bound", "within", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["world_size"]), row["side"], *_cells(row))
    return table


def main(argv: list[str]) -> None:
    """Make the model, measure, write after each turn, show."""
    options = _parse(argv)
    plan = SMOKE if options.smoke else FULL
    output = options.output or (None if options.smoke else RESULTS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_bf16_model(plan, folder / "model")
        save_data(plan.workload, folder / "data.jsonl")
        settings = _describe(plan, folder / "model")
        for rows in measure_all(plan, folder):
            if output:
                certificate = build_provenance("benchmarks.load", argv, **settings)
                write_json_atomically(output, certificate | {"rows": rows})
    # Wide enough for every column, also where the output is not a terminal.
    Console(width=max(_WIDTH, Console().width)).print(build_table(rows))


def _measure(side: str, world_size: int, plan: Plan, folder: Path) -> list[dict[str, float]] | str:
    with tempfile.TemporaryDirectory() as meeting:
        try:
            return measure_load(Job(side, world_size, plan.workload, folder, Path(meeting)))
        except (
            multiprocessing.ProcessRaisedException,
            multiprocessing.ProcessExitedException,
        ) as error:
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


def _cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [f"failed: {row['error'][:40]}", *[""] * 5]
    cells = [_spread_cell(row["peak_bytes"])]
    cells += [f"{row[key]['median'] / _MB:.0f}" for key in ("bare_bytes", "own_bytes")]
    bound = "" if row["side"] not in OURS else f"{row['bound_bytes']['median'] / _MB:.0f}"
    within = "" if row["side"] not in OURS else ("yes" if row["is_within_bound"] else "no")
    return [*cells, bound, within, _spread_cell(row["seconds"], unit=1, digits=1)]


def _spread_cell(values: dict[str, float], unit: float = _MB, digits: int = 0) -> str:
    least, largest = (f"{values[key] / unit:.{digits}f}" for key in ("min", "max"))
    return f"{values['median'] / unit:.{digits}f} ({least}-{largest})"


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help=f"the JSON file (default: {RESULTS.name})")
    parser.add_argument("--smoke", action="store_true", help="tiny, and no file unless --output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
