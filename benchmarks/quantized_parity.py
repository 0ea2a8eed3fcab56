"""How far runs over packed experts are from one process of PEFT on what these dequantize to.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m benchmarks.quantized_parity

Every axis and option beside which experts may be packed, in each format, two steps on 4 CPU ranks;
more than nine minutes on two cores with other work beside. Writes
benchmarks/results/quantized_parity_cpu.json and prints a Markdown table. Ends with exit code 1 if a
bound does not hold.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from typing import Any

from benchmarks.harness.provenance import RESULTS, build_provenance
from benchmarks.harness.rank_pools import finish, open_rank_pools
from benchmarks.harness.report import markdown_table
from benchmarks.lora_parity import find_violations, measure_rows
from benchmarks.parity import MEASURED
from tests.support.parity import TWO_BATCHES, Layout, ParityCase

RESULT = RESULTS / "quantized_parity_cpu.json"
FORMATS = ("nf4", "int8", "fp8", "mxfp4")
BLOCKS, TURNED = "mixtral, 6 experts", "gpt_oss, 6 experts"
# Script, layout, model, options; formats take turns, or all of them are run.
ALL_FORMATS: tuple[tuple[str, Layout, str, dict[str, Any]], ...] = (
    ("fsdp2", Layout(4, 2), BLOCKS, {}),  # three experts on two ranks: shards of rows
    ("fsdp2", Layout(4, 1, expert_tp_size=2), BLOCKS, {}),
)
ONE_FORMAT: tuple[tuple[str, Layout, str, dict[str, Any]], ...] = (
    ("fsdp2", Layout(4, 2), "mixtral", {"accumulation": 2}),  # shards of whole experts
    ("fsdp2", Layout(4, 1), "mixtral, 3 experts", {}),  # of unequal numbers of them
    ("fsdp2", Layout(4, 2), TURNED, {"checkpointing": "False"}),
    ("fsdp2", Layout(4, 2, expert_tp_size=2), TURNED, {}),
    ("fsdp2", Layout(4, 2, expert_tp_size=2), BLOCKS, {"accumulation": 2}),
    ("fsdp2", Layout(4, 1, groups=2), BLOCKS, {"checkpointing": "selective"}),
    ("fsdp2", Layout(4, 1, groups=2), "mixtral, 3 experts", {}),
    ("fsdp2", Layout(4, 2, sp_size=2), "mixtral", {}),
    ("fsdp2", Layout(4, 2, tp_size=2), "mixtral", {}),
    ("fsdp2", Layout(4, 2), BLOCKS, {"cpu_offload": "params"}),
    ("fsdp2", Layout(4, 4), "mixtral", {"cpu_offload": "params"}),
    ("fsdp2", Layout(4, 2), "mixtral", {"cpu_offload": "optimizer"}),
    ("fsdp2", Layout(4, 2), "mixtral", {"token_dispatch": "tokens"}),
    ("fsdp2", Layout(4, 2), BLOCKS, {"placement": "balanced"}),
    ("fsdp2", Layout(4, 2, "replicate"), "qwen3_moe", {"checkpointing": "selective"}),
    ("fsdp2", Layout(4, 0), "mixtral", {}),
    ("fsdp2", Layout(4, 2), "mixtral", {"compiles": True}),
    ("fsdp1", Layout(4, 2, "replicate"), "qwen3_moe", {"placement": "balanced"}),
    ("fsdp1", Layout(4, 2, "replicate", expert_tp_size=2), BLOCKS, {}),
    # Looked up inside the product's loop (mxfp4, nf4), in Triton's interpreter.
    ("fsdp2", Layout(4, 2), TURNED, {"kernel": "triton"}),
    ("fsdp2", Layout(4, 2), BLOCKS, {"kernel": "triton"}),
)


def quantized_cases() -> Iterator[tuple[str, ParityCase]]:
    """Yield script and case."""
    chosen = [(case, name) for case in ALL_FORMATS for name in FORMATS]
    chosen += list(zip(ONE_FORMAT, cycle(FORMATS), strict=False))
    for (script, layout, model, options), name in chosen:
        yield (
            script,
            ParityCase(
                layout,
                model,
                num_steps=2,
                num_examples=TWO_BATCHES,
                lora="all",
                lora_rank=4,
                quantization=name,
                **options,
            ),
        )


def main() -> None:
    """Measure, write, show, judge."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()  # --help, no options
    started = time.monotonic()
    with open_rank_pools(4) as (pools, folder):
        rows = measure_rows(pools, folder, quantized_cases())
    runtime_s = round(time.monotonic() - started)
    provenance = build_provenance("benchmarks.quantized_parity", sys.argv[1:], runtime_s=runtime_s)
    cells = [
        [
            row["script"],
            row["layout"],
            row["model"],
            row["quantization"],
            *(f"{row[name]:.1e}" for name in MEASURED),
        ]
        for row in rows
    ]
    table = markdown_table(("script", "layout", "model", "format", *MEASURED), cells, num_left=4)
    finish(RESULT, provenance | {"rows": rows}, table, find_violations(rows))


if __name__ == "__main__":
    main()
