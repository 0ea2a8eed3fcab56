"""Play ranks of 64 to 4096, and compare what they send with the plan, by link.

    PYTHONPATH=. python -m benchmarks.scale_simulation

Ranks take the training step with meshes, shards and FSDP units of their own, on tensors without
memory and a fake process group. What each sends is counted by the ranks that the collective's group
really has. Of a layout with every axis of the experts' mesh, all ranks of 64 are compared with the
placement plan.
"""

import gc
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness.provenance import build_provenance
from benchmarks.harness.report import markdown_table
from benchmarks.scale_placement import Held, check_all, hold
from benchmarks.scale_ranks import LINKS, Case, Compared, be_quiet, compare
from megablocks_utils.byte_units import GB
from megablocks_utils.planning.model.prediction import COLLECTIVES, ParallelLayout

PAGE = Path(__file__).parent / "results" / "scale.md"
MARK = "<!-- From here on written by python -m benchmarks.scale_simulation -->"
END = "<!-- Until here -->"
MODELS = ("qwen3.5-35b-a3b", "gpt-oss-120b", "qwen3-235b-a22b", "mixtral-8x7b", "deepseek-v3")
"""Those that take longest first."""
WORLD_SIZES = (64, 512, 4096)
NUM_PROCESSES = 2
PLACED = Case("mixtral-8x7b", 64, ParallelLayout(4, "shard"), num_groups=4, expert_tp_size=2)
WEIGHTS = [kind for kind in COLLECTIVES if kind != "all_to_all"]
COLUMNS = (
    "model",
    "layout",
    "GPUs",
    "tokens",
    "weights, in the node",
    "to others",
    "tokens, in the node",
    "to others",
    "weights: off",
    "tokens: off",
    "off from equal shares",
)


def list_cases() -> Iterator[Case]:
    """List the runs: ep groups of a node and larger ones, shards and copies, with HSDP."""
    for world_size in WORLD_SIZES:
        yield Case("mixtral-8x7b", world_size, ParallelLayout(8, "replicate"))
        yield Case("mixtral-8x7b", world_size, ParallelLayout(8, "shard"), world_size // 8)
        yield Case("mixtral-8x7b", world_size, ParallelLayout(8, "shard"), expert_tp_size=2)
        yield Case("qwen3-235b-a22b", world_size, ParallelLayout(8, "shard"))
        yield Case("qwen3-235b-a22b", world_size, ParallelLayout(32, "shard"), world_size // 32)
        yield Case("deepseek-v3", world_size, ParallelLayout(32, "shard"), world_size // 64)
        yield Case("gpt-oss-120b", world_size, ParallelLayout(16, "shard"), world_size // 64)
        # Its linear attention is a loop over blocks of tokens, of many small operators each.
        of_hybrid = Case("qwen3.5-35b-a3b", world_size, ParallelLayout(8, "replicate"))
        yield replace(of_hybrid, tokens=512)


def choose_ranks(world_size: int) -> list[int]:
    """Choose the first rank and the last; of 64 also one inside an ep group on a middle node."""
    middle = [world_size // 2 + 3] if world_size == min(WORLD_SIZES) else []
    return [0, *middle, world_size - 1]


def play_all(pool: ProcessPoolExecutor) -> list[list[Compared]]:
    """Play the chosen ranks of all runs, those of one model in one process: it remembers more."""
    cases = sorted(list_cases(), key=lambda case: (case.layout.describe(), case.world_size))
    of_models = [[case for case in cases if case.model == model] for model in MODELS]
    return [played for of_model in pool.map(_play_cases, of_models) for played in of_model]


def place_all(pool: ProcessPoolExecutor) -> int:
    """Compare the ranks of one layout with the placement plan; returns how many.

    Raises:
        PlacementError: naming what lies otherwise.
    """
    held = list(pool.map(_hold, range(PLACED.world_size), chunksize=8))
    check_all(held)
    larger = [replace(PLACED, world_size=size) for size in WORLD_SIZES[1:]]
    some = [(case, rank) for case in larger for rank in choose_ranks(case.world_size)]
    return len(held) + len(list(pool.map(hold, *zip(*some, strict=True))))


def _play_cases(cases: Sequence[Case]) -> list[list[Compared]]:
    return [[compare(case, rank) for rank in choose_ranks(case.world_size)] for case in cases]


def _hold(rank: int) -> Held:
    return hold(PLACED, rank)


def format_row(compared: Sequence[Compared]) -> list[str]:
    """Return the cells of one run: what rank 0 sends, and how far all are from the plan."""
    first, case = compared[0], compared[0].case
    sent = [
        f"{sum(first.played[kind, link] for kind in kinds) / GB:.2f}"
        for kinds in (WEIGHTS, ["all_to_all"])
        for link in LINKS
    ]
    off = [
        max(one.find_difference(WEIGHTS) for one in compared),
        max(one.find_difference(["all_to_all"]) for one in compared),
        max(one.find_rounding() for one in compared),
    ]
    cells = [case.model, case.describe(), f"{case.world_size:,}", f"{case.tokens:,}"]
    return cells + sent + [f"{num_bytes:,}" for num_bytes in off]


def describe_run(provenance: dict[str, Any], num_played: int, num_placed: int, took: float) -> str:
    """Say how many ranks were played and placed, how long it took, and on what."""
    versions, hardware = provenance["versions"], provenance["hardware"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
    return (
        f"{num_played} rank steps, and {num_placed} ranks compared with the placement plan: "
        f"{took:.0f} s, {NUM_PROCESSES} processes ({hardware['cpu']}). {named}, commit "
        f"{(provenance['commit'] or 'unknown')[:7]}, {provenance['date'][:10]}."
    )


def _be_worker() -> None:
    be_quiet()
    gc.disable()  # what a rehearsal leaves behind is small: its tensors have no memory


def main() -> None:
    """Play all runs, and write the page's table."""
    start = time.perf_counter()
    be_quiet()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(NUM_PROCESSES, context, initializer=_be_worker) as pool:
        num_placed, runs = place_all(pool), play_all(pool)
    took = time.perf_counter() - start
    provenance = build_provenance("benchmarks.scale_simulation", sys.argv[1:])
    table = markdown_table(COLUMNS, map(format_row, runs), num_left=2)
    told = describe_run(provenance, sum(map(len, runs)), num_placed, took)
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    tail = rest.partition(END)[2]
    PAGE.write_text(f"{head}{MARK}\n\n{table}\n\n{told}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
