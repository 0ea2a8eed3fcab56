"""Tokens per second of our FSDP2 step against transformers' own expert parallelism, on CPU ranks.

    PYTHONPATH=. python -m benchmarks.end_to_end

The contenders train in the same processes and take turns, a block of steps each, so that whatever
else the machine does hits all of them. Before anything is timed, the losses of the first steps must
agree. Each case has processes of its own.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.end_to_end.contenders import Case
from benchmarks.end_to_end.measure import NAMES, PACKED, PADDED, Plan, measure, summarise
from benchmarks.harness.processes import run_ranks
from benchmarks.harness.provenance import RESULTS, build_provenance
from benchmarks.harness.record import Record, Row
from benchmarks.harness.report import format_spread, show
from benchmarks.harness.workload import Workload, save_workload

RESULT = RESULTS / "end_to_end_cpu.json"
CASES = [
    Case(2, 2),
    Case(2, 2, gradient_checkpointing="True"),
    Case(2, 2, use_lora="attn-only"),
    Case(2, 2, use_lora="attn-only", gradient_checkpointing="True"),
    Case(4, 2),
    Case(4, 2, gradient_checkpointing="True"),
    Case(4, 4),
    Case(4, 4, gradient_checkpointing="True"),
]


def main(argv: list[str]) -> None:
    """Run the cases; after each, write its row in place of an older one of the same case."""
    options = _parse(argv)
    plan, workload = Plan(options.rounds, options.steps_per_block), Workload()
    settings = {"workload": asdict(workload), "plan": asdict(plan)}
    path = Path(options.output)
    record = Record.read(path) if path.exists() else Record(path, {})
    with tempfile.TemporaryDirectory() as name:
        save_workload(workload, Path(name))
        for case in CASES:
            if options.only not in case.label():
                continue
            [result, *_] = run_ranks(measure, case.world_size, case, workload, Path(name), plan)
            provenance = build_provenance("benchmarks.end_to_end", argv)
            row = {"case": asdict(case)} | provenance | settings | summarise(result)
            record.add(row | {"rounds": result}, "case")
            show(table_line(row))


def table_line(row: Row) -> str:
    """Return a line of the Markdown table in the results' page."""
    case, others = row["case"], (PACKED, PADDED)
    cells = [
        f"{case['world_size']}, ep {case['ep_size']}",
        "full" if case["use_lora"] == "none" else f"LoRA {case['use_lora']}",
        "full" if case["gradient_checkpointing"] == "True" else "none",
        *(f"{row['tokens_per_s'][name]['median']:.0f}" for name in NAMES),
        *(format_spread(row["ratio"][name], is_bold=True) for name in others),
        *(format_spread(row["ratio_of_cpu_time"][name], is_bold=True) for name in others),
    ]
    return f"| {' | '.join(cells)} |"


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--steps-per-block", type=int, default=2, help="steps of a turn")
    parser.add_argument("--only", default="", help="cases whose label holds this text")
    parser.add_argument("--output", default=RESULT, help="the JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
