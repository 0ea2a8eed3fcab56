"""How far runs with several mesh axes at once are from one process of stock transformers.

    PYTHONPATH=. python -m benchmarks.composition [--only LAYOUT ...]

Products of HSDP, expert, expert tensor, tensor and sequence parallelism on 4 and 8 CPU ranks, 20
steps, full and LoRA. Writes benchmarks/results/composition.json and prints it as a Markdown table.
Ends with exit code 1 if a bound does not hold. With `--only`, rows of other layouts stay as they
are in the file.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product

from benchmarks.harness.provenance import RESULTS, build_provenance
from benchmarks.harness.rank_pools import finish, open_rank_pools
from benchmarks.harness.record import Row
from benchmarks.harness.report import group_rows, markdown_table
from benchmarks.parity import MEASURED, find_violations, measure_parity, worst_of
from tests.support.parity import Layout, ParityCase

RESULT = RESULTS / "composition.json"
MODELS = ("mixtral", "qwen3_moe", "gpt_oss")
LAYOUTS = (
    Layout(4, 2, groups=2),
    Layout(4, 2, expert_tp_size=2),
    Layout(4, 2, tp_size=2),
    Layout(4, 2, sp_size=2),
    Layout(4, 2, sp_size=2, tp_size=2),
    Layout(4, 1, sp_size=2, expert_tp_size=2),
    Layout(4, 1, tp_size=2, expert_tp_size=2),
    Layout(4, 1, groups=2, tp_size=2),
    Layout(8, 2, groups=2, expert_tp_size=2),
    Layout(8, 2, groups=2, sp_size=2),
    Layout(8, 2, groups=2, sp_size=2, tp_size=2),
)


def composed_cases(layouts: Sequence[Layout]) -> Iterator[ParityCase]:
    """Yield full runs and runs with adapters of each, in turn with both ways of recomputing.

    Adapters are on the experts; the routers' auxiliary loss is in the full run of Mixtral.
    """
    for layout, (number, model), lora in product(layouts, enumerate(MODELS), ("none", "mlp-only")):
        is_selective = (number % 2 == 0) == (lora == "none")
        yield ParityCase(
            layout,
            model,
            lora=lora,
            checkpointing="selective" if is_selective else "True",
            aux_loss_coef=0.02 if (model, lora) == ("mixtral", "none") else 0.0,
        )


def main() -> None:
    """Measure, write, show, judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[str(layout) for layout in LAYOUTS])
    only = parser.parse_args().only
    layouts = [layout for layout in LAYOUTS if only is None or str(layout) in only]
    started = time.monotonic()
    with open_rank_pools(*sorted({layout.world_size for layout in layouts})) as (pools, folder):
        rows = measure_parity(pools, folder, composed_cases(layouts))
    runtime_s = round(time.monotonic() - started)
    rows = [*_rows_of_others(layouts), *rows]
    provenance = build_provenance("benchmarks.composition", sys.argv[1:], runtime_s=runtime_s)
    cells = [
        [layout, model, str(len(found)), *worst_of(found)]
        for (layout, model), found in group_rows(rows, "layout", "model").items()
    ]
    table = markdown_table(("layout", "model", "runs", *MEASURED), cells, num_left=2)
    finish(RESULT, provenance | {"parity": rows}, table, find_violations(rows, []))


def _rows_of_others(layouts: Sequence[Layout]) -> list[Row]:
    """Return the rows that the file has of layouts that are not measured now."""
    if len(layouts) == len(LAYOUTS) or not RESULT.exists():
        return []
    measured = {str(layout) for layout in layouts}
    known = json.loads(RESULT.read_text(encoding="utf-8"))["parity"]
    return [row for row in known if row["layout"] not in measured]


if __name__ == "__main__":
    main()
