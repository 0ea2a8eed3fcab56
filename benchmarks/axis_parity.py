"""How far runs with further mesh axes are from one process of stock transformers, over 20 steps.

    PYTHONPATH=. python -m benchmarks.axis_parity

Experts in slices (`--expert_tp_size`), full and LoRA, on four CPU ranks. Writes
benchmarks/results/axis_parity_cpu.json and prints a Markdown table. Ends with exit code 1 if a
bound does not hold.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product

from benchmarks.harness.provenance import RESULTS, build_provenance
from benchmarks.harness.rank_pools import finish, open_rank_pools
from benchmarks.harness.record import Row
from benchmarks.harness.report import markdown_table, say
from benchmarks.parity import MEASURED, describe_case, find_violations, worst_of
from tests.support.parity import Layout, ParityCase, run_case
from tests.support.trace import measure_distance

RESULT = RESULTS / "axis_parity_cpu.json"
LAYOUTS = (Layout(4, 1, expert_tp_size=2), Layout(4, 2, expert_tp_size=2))
MODELS = ("mixtral", "qwen3_moe", "gpt_oss")


def axis_cases() -> Iterator[ParityCase]:
    """Yield every layout x model, full and with adapters on the experts."""
    for model, layout, lora in product(MODELS, LAYOUTS, ("none", "mlp-only")):
        yield ParityCase(layout, model, lora=lora)


def measure_rows() -> list[Row]:
    """Run all cases and return a row for each, as `benchmarks.parity` does."""
    rows = []
    with open_rank_pools(4) as (pools, folder):
        for case in axis_cases():
            wanted = folder.reference(folder.stock_run(case))
            exact = folder.reference(folder.stock_run(case, "float64"))
            seen = run_case(pools, folder, case)
            row = describe_case(case) | asdict(measure_distance(seen, wanted))
            row["weight_from_fp64"] = measure_distance(seen, exact).weight
            row["reference_weight_from_fp64"] = measure_distance(wanted, exact).weight
            rows.append(row)
            say(f"{case}: " + ", ".join(f"{name} {row[name]:.1e}" for name in MEASURED))
    return rows


def main() -> None:
    """Measure, write, show, judge."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()  # --help, no options
    started = time.monotonic()
    rows = measure_rows()
    runtime_s = round(time.monotonic() - started)
    provenance = build_provenance("benchmarks.axis_parity", sys.argv[1:], runtime_s=runtime_s)
    cells = [[row["layout"], row["model"], row["lora"], *worst_of([row])] for row in rows]
    table = markdown_table(("layout", "model", "LoRA", *MEASURED), cells, num_left=3)
    finish(RESULT, provenance | {"parity": rows}, table, find_violations(rows, []))


if __name__ == "__main__":
    main()
