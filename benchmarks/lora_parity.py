"""How far runs that train adapters of experts are from one process of PEFT: the full matrix.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m benchmarks.lora_parity

Both scripts x ep size x rank x model over 20 steps on 4 CPU ranks, from one adapter that PEFT has
written (B not zero), and some special cases; about six minutes on two cores. Writes
benchmarks/results/lora_parity_cpu.json and prints a Markdown table. Ends with exit code 1 if a
bound does not hold.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import product

from benchmarks.harness.provenance import RESULTS, build_provenance
from benchmarks.harness.rank_pools import finish, open_rank_pools
from benchmarks.harness.record import Row
from benchmarks.harness.report import group_rows, markdown_table, say
from benchmarks.parity import BOUND, MEASURED, describe_case, worst_of
from tests.support.fsdp1_run import train_fsdp1
from tests.support.parity import Layout, ParityCase, ParityFolder, run_case, train_fsdp2
from tests.support.rank_pool import RankPool
from tests.support.trace import measure_distance, measure_excess

RESULT = RESULTS / "lora_parity_cpu.json"
TRAIN = {"fsdp2": train_fsdp2, "fsdp1": train_fsdp1}
OWN_EXPERT_DP = {"fsdp2": "shard", "fsdp1": "replicate"}
EP_SIZES, RANKS = (1, 2, 4), (1, 4, 16)
MODELS = ("mixtral, wide", "qwen3_moe", "olmoe")
MAX_EXCESS = 4  # of a final weight, see `measure_excess`


def lora_cases() -> Iterator[tuple[str, ParityCase]]:
    """Yield script and case: the matrix, then special cases."""
    for script, model, ep_size, rank in product(TRAIN, MODELS, EP_SIZES, RANKS):
        layout = Layout(4, ep_size, OWN_EXPERT_DP[script])
        yield script, ParityCase(layout, model, lora="all", lora_rank=rank)
    for script, ep_size in product(TRAIN, EP_SIZES):
        layout = Layout(4, ep_size, OWN_EXPERT_DP[script])
        # Experts, and with ep 4 ranks, that never receive a token; adapters of experts only.
        yield script, ParityCase(layout, "olmoe, starved", lora="mlp-only", lora_rank=4)
    for checkpointing in ("False", "selective"):
        yield (
            "fsdp2",
            ParityCase(
                Layout(4, 2, "replicate"),
                "mixtral, wide",
                lora="all",
                lora_rank=4,
                accumulation=4,
                sync_each_batch=False,
                checkpointing=checkpointing,
            ),
        )


def measure_rows(
    pools: Mapping[int, RankPool],
    folder: ParityFolder,
    cases: Iterable[tuple[str, ParityCase]],
) -> list[Row]:
    """Run cases and return a row for each: its options and its worst relative differences.

    `weight_excess` is there where a final weight is further than the bound from fp32 stock: the
    largest quotient of a weight's distance from fp64 and that of fp32 stock (or the bound).
    """
    rows = []
    for script, case in cases:
        started = time.monotonic()
        wanted = folder.reference(folder.stock_run(case))
        seen = run_case(pools, folder, case, TRAIN[script])
        row = {"script": script} | describe_case(case) | asdict(measure_distance(seen, wanted))
        if row["weight"] >= BOUND:
            exact = folder.reference(folder.stock_run(case, "float64"))
            row["weight_excess"] = measure_excess(seen, wanted, exact, floor=BOUND)
        rows.append(row)
        worst = ", ".join(f"{name} {row[name]:.1e}" for name in MEASURED)
        say(f"{script}, {case}: {worst} ({time.monotonic() - started:.1f} s)")
    return rows


def format_table(rows: list[Row]) -> str:
    """Return Markdown: the worst over all ep sizes and options of a script, model and rank."""
    worst = [
        [script, model, str(rank), str(len(group)), *worst_of(group)]
        for (script, model, rank), group in group_rows(rows, "script", "model", "lora_rank").items()
    ]
    return markdown_table(("script", "model", "r", "runs", *MEASURED), worst, num_left=2)


def find_violations(rows: list[Row]) -> list[str]:
    """Name every row that breaks a bound."""
    return [
        f"parity: {row}"
        for row in rows
        if max(row["loss"], row["grad_norm"], row["first_gradient"]) >= BOUND
        or row.get("weight_excess", 0) >= MAX_EXCESS
    ]


def main() -> None:
    """Measure, write, show, judge."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()  # --help, no options
    started = time.monotonic()
    with open_rank_pools(4) as (pools, folder):
        rows = measure_rows(pools, folder, lora_cases())
    runtime_s = round(time.monotonic() - started)
    provenance = build_provenance("benchmarks.lora_parity", sys.argv[1:], runtime_s=runtime_s)
    finish(RESULT, provenance | {"rows": rows}, format_table(rows), find_violations(rows))


if __name__ == "__main__":
    main()
