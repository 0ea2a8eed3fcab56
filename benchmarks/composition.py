"""How far runs with several mesh axes at once are from one process of stock transformers.

    PYTHONPATH=. python -m benchmarks.composition [--only LAYOUT ...]

Products of HSDP, expert, expert tensor, tensor and sequence parallelism on 4 and 8 CPU ranks, 20
steps, full and LoRA. Writes benchmarks/results/composition.json and prints it as a Markdown table.
Ends with exit code 1 if a bound does not hold. With `--only`, rows of other layouts stay as they
are in the file.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

from benchmarks.harness.provenance import RESULTS, build_provenance
from benchmarks.harness.rank_pools import finish, open_rank_pools
from benchmarks.harness.record import Record, Row
from benchmarks.harness.report import group_rows, markdown_table
from benchmarks.lora_parity import MAX_EXCESS
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
    Layout(8, 2, groups=2, expert_tp_size=2),
    Layout(8, 2, groups=2, sp_size=2),
)


def list_cases() -> Iterator[ParityCase]:
    """Yield a full run of each layout and model, and one with adapters on the experts.

    The model with adapters changes from layout to layout, and the way of recomputing from run to
    run. The routers' auxiliary loss is in the full runs of Mixtral.
    """
    for number, layout in enumerate(LAYOUTS):
        cases = [(model, "none") for model in MODELS] + [(MODELS[number % len(MODELS)], "mlp-only")]
        for place, (model, lora) in enumerate(cases):
            yield ParityCase(
                layout,
                model,
                lora=lora,
                checkpointing="selective" if (number + place) % 2 else "True",
                aux_loss_coef=0.02 if (model, lora) == ("mixtral", "none") else 0.0,
            )


def main() -> None:
    """Measure what the file does not have, write, show, judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="LAYOUT", default=[])
    only = parser.parse_args().only
    started = time.monotonic()
    cases = [case for case in list_cases() if not only or str(case.layout) in only]
    record = _open_record(cases)
    with open_rank_pools(*sorted({case.layout.world_size for case in cases})) as (pools, folder):
        for case in cases:
            record.rows.extend(measure_parity(pools, folder, [case]))
            record.content["runtime_s"] += round(time.monotonic() - started)
            started = time.monotonic()
            record.write()
    cells = [
        [layout, model, lora, checkpointing, *worst_of(found)]
        for (layout, model, lora, checkpointing), found in group_rows(
            record.rows, "layout", "model", "lora", "checkpointing"
        ).items()
    ]
    heads = ("layout", "model", "LoRA", "checkpointing", *MEASURED)
    table = markdown_table(heads, cells, num_left=4)
    finish(RESULT, record.content, table, find_all_violations(record.rows))


def find_all_violations(rows: Sequence[Row]) -> list[str]:
    """Name every row that breaks its bound.

    Adapters' weights are held against fp64: Adam's updates of factors with gradients near zero are
    rounding, in stock fp32 too, from which they may be `MAX_EXCESS` times as far as that is.
    """
    judged = []
    for row in rows:
        excess = row["weight_from_fp64"] / row["reference_weight_from_fp64"]
        is_rounding = row["lora"] != "none" and excess < MAX_EXCESS
        judged.append(row | {"weight": 0.0} if is_rounding else row)
    return find_violations(judged, [])


def _open_record(cases: Sequence[ParityCase]) -> Record:
    """Return the rows that the file has of layouts that are not measured now."""
    content = build_provenance("benchmarks.composition", sys.argv[1:], runtime_s=0) | {"rows": []}
    if RESULT.exists():
        measured = {str(case.layout) for case in cases}
        known = Record.read(RESULT)
        content["rows"] = [row for row in known.rows if row["layout"] not in measured]
        content["runtime_s"] = known.content["runtime_s"]
    return Record(RESULT, content)


if __name__ == "__main__":
    main()
