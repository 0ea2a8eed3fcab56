"""How far FSDP2 runs on CPU ranks are from one process of stock transformers: the full matrix.

    PYTHONPATH=. python -m benchmarks.parity

Every layout x family x accumulation x checkpointing over 20 steps, some special cases, and the
drift of each precision; about ten minutes on two cores. Writes benchmarks/results/parity_cpu.json
and prints it as Markdown tables. Ends with exit code 1 if a bound does not hold.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.provenance import build_provenance
from megablocks_utils.files import write_json_atomically
from tests.support.parity import LAYOUTS, Layout, ParityCase, ParityFolder, run_case
from tests.support.rank_pool import RankPool
from tests.support.tiny_models import FAMILIES
from tests.support.trace import measure_distance, measure_drift

RESULTS = Path(__file__).parent / "results" / "parity_cpu.json"
BOUND = 1e-5
DRIFT_BOUND = 2.0
CHECKPOINTING = ("True", "False", "selective")
ACCUMULATION = (1, 4)
PRECISIONS = ("bf16", "mixed", "bf16_sr")
MEASURED = ("loss", "grad_norm", "first_gradient", "weight")


def parity_cases() -> Iterator[ParityCase]:
    """Yield the matrix, then what lies beside it."""
    for model, layout, accumulation, checkpointing in product(
        FAMILIES, LAYOUTS, ACCUMULATION, CHECKPOINTING
    ):
        yield ParityCase(
            layout,
            model,
            accumulation=accumulation,
            checkpointing=checkpointing,
            sync_each_batch=checkpointing == "True",
        )
    for layout in LAYOUTS:
        yield ParityCase(layout, "qwen3_moe", lora="attn-only")
        yield ParityCase(layout, "mixtral", aux_loss_coef=0.02)
        yield ParityCase(layout, "olmoe", weight_decay=0.1, max_grad_norm=0.0)
        yield ParityCase(layout, "qwen3_moe, tied")
    yield ParityCase(Layout(4, 2), "olmoe, 2 experts")
    yield ParityCase(Layout(4, 1), "mixtral")
    yield ParityCase(Layout(4, 0), "mixtral")
    yield ParityCase(Layout(4, 2), "mixtral", num_examples=3, accumulation=4)


def measure_parity(pools: Mapping[int, RankPool], folder: ParityFolder) -> list[dict[str, Any]]:
    """Run all cases and return a row for each: its options and its worst relative differences.

    `weight_from_fp64` is the distance of the final weights from the reference run in fp64, and
    `reference_weight_from_fp64` that of the fp32 reference itself.
    """
    rows = []
    for case in parity_cases():
        started = time.monotonic()
        wanted = folder.reference(folder.stock_run(case))
        exact = folder.reference(folder.stock_run(case, "float64"))
        seen = run_case(pools, folder, case)
        row = describe_case(case) | asdict(measure_distance(seen, wanted))
        row["weight_from_fp64"] = measure_distance(seen, exact).weight
        row["reference_weight_from_fp64"] = measure_distance(wanted, exact).weight
        rows.append(row)
        worst = ", ".join(f"{name} {row[name]:.1e}" for name in MEASURED)
        say(f"{case}: {worst} ({time.monotonic() - started:.1f} s)")
    return rows


def measure_drifts(pools: Mapping[int, RankPool], folder: ParityFolder) -> list[dict[str, Any]]:
    """Run every precision; return rows with the drift of the losses from stock fp32."""
    rows = []
    for model, layout, precision in product(FAMILIES, LAYOUTS, PRECISIONS):
        case = ParityCase(layout, model, precision=precision)
        wanted = folder.reference(folder.stock_run(case))
        stock = measure_drift(folder.reference(folder.stock_run(case, "bfloat16")), wanted)
        drift = measure_drift(run_case(pools, folder, case), wanted)
        rows.append(describe_case(case) | {"drift": drift, "stock_bf16_drift": stock})
        say(f"{case}: drift {drift:.1e}, stock bf16 {stock:.1e}")
    return rows


def describe_case(case: ParityCase) -> dict[str, Any]:
    """Return the options of a case as plain values."""
    return asdict(case) | {"layout": str(case.layout), "batch_size": case.batch_size}


def format_tables(parity: list[dict[str, Any]], drifts: list[dict[str, Any]]) -> str:
    """Return both results as Markdown: the worst over all options of a layout and model."""
    lines = [
        f"| layout | model | runs | {' | '.join(MEASURED)} |",
        "|---|---|---:|" + "---:|" * len(MEASURED),
    ]
    for (layout, model), rows in grouped(parity, "layout", "model").items():
        worst = [f"{max(row[name] for row in rows):.1e}" for name in MEASURED]
        lines.append(f"| {layout} | {model} | {len(rows)} | {' | '.join(worst)} |")
    lines += ["", "| precision | model | drift / stock bf16's drift, by layout |", "|---|---|---|"]
    for (precision, model), rows in grouped(drifts, "precision", "model").items():
        ratios = ", ".join(f"{row['drift'] / row['stock_bf16_drift']:.2f}" for row in rows)
        lines.append(f"| {precision} | {model} | {ratios} |")
    return "\n".join(lines) + "\n"


def find_violations(parity: list[dict[str, Any]], drifts: list[dict[str, Any]]) -> list[str]:
    """Name every row that breaks its bound."""
    broken = []
    for row in parity:
        # Nearer to fp64 than the bound is near enough: fp32 runs differ among themselves.
        weight = min(row["weight"], row["weight_from_fp64"])
        if max(row["loss"], row["grad_norm"], row["first_gradient"], weight) >= BOUND:
            broken.append(f"parity: {row}")
    broken += [
        f"drift: {row}" for row in drifts if row["drift"] >= DRIFT_BOUND * row["stock_bf16_drift"]
    ]
    return broken


def grouped(rows: list[dict[str, Any]], *keys: str) -> dict[tuple, list[dict[str, Any]]]:
    """Return the rows by the values of some of their keys, in order of appearance."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


@contextmanager
def open_workplace(*pool_sizes: int) -> Iterator[tuple[dict[int, RankPool], ParityFolder]]:
    """Give pools of ranks by size, and a folder that is gone afterwards; one thread a rank."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = ParityFolder(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        yield {size: stack.enter_context(RankPool(size)) for size in pool_sizes}, folder


def say(text: str) -> None:
    """Write a line to standard error; standard output gets the tables."""
    sys.stderr.write(text + "\n")


def main() -> None:
    """Measure, write, show, judge."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()  # --help, no options
    started = time.monotonic()
    with open_workplace(1, 2, 4) as (pools, folder):
        parity = measure_parity(pools, folder)
        drifts = measure_drifts(pools, folder)
    certificate = build_provenance(
        "benchmarks.parity", sys.argv[1:], runtime_s=round(time.monotonic() - started)
    )
    RESULTS.parent.mkdir(exist_ok=True)
    write_json_atomically(RESULTS, certificate | {"parity": parity, "drifts": drifts})
    sys.stdout.write(format_tables(parity, drifts))
    violations = find_violations(parity, drifts)
    for violation in violations:
        say(violation)
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
