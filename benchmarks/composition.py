"""How far runs with several mesh axes at once are from one process of stock transformers.

    PYTHONPATH=. python -m benchmarks.composition [--only LAYOUT ...] [--missing]

HSDP, expert, expert tensor, tensor and sequence parallelism and their products on 4 and 8 CPU
ranks, 20 steps, full and LoRA; two steps on 16 ranks, more than there are experts. Writes
benchmarks/results/composition.json and prints it as a Markdown table. Ends with exit code 1 if a
bound does not hold. With `--only`, rows of other layouts stay as they are in the file; with
`--missing`, all rows do.
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
    Layout(4, 1, tp_size=2),
    Layout(4, 1, expert_tp_size=2),
    Layout(4, 1, groups=2),
    Layout(4, 1, sp_size=2),
)
FEW_ADAPTERS = LAYOUTS[4:7]
"""Layouts of which one model has adapters; of the others every one, too."""
MANY_RANKS = ParityCase(Layout(16, 8, expert_tp_size=2), "mixtral, 8 experts", num_steps=2)


def list_cases() -> Iterator[ParityCase]:
    """Yield a full run of each layout and model, and those with adapters.

    The model with adapters on the experts alone changes from layout to layout, and the way of
    recomputing from run to run. The routers' auxiliary loss is in the full runs of Mixtral.
    """
    yield MANY_RANKS
    for number, layout in enumerate(LAYOUTS):
        alone = MODELS[number % len(MODELS)]
        cases = [(model, "none") for model in MODELS] + [(alone, "mlp-only")]
        if layout not in FEW_ADAPTERS:
            cases += [(model, "all") for model in MODELS if model != alone]
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
    parser.add_argument("--missing", action="store_true", help="only cases that the file has not")
    options = parser.parse_args()
    started = time.monotonic()
    only = options.only
    cases = [case for case in list_cases() if not only or str(case.layout) in only]
    known = Record.read(RESULT) if RESULT.exists() else None
    if options.missing and known is not None:
        cases = [case for case in cases if known.find(**_key(case)) is None]
    record = _open_record(known, cases)
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


def _key(case: ParityCase) -> dict[str, str]:
    return {"layout": str(case.layout), "model": case.model, "lora": case.lora}


def _open_record(known: Record | None, cases: Sequence[ParityCase]) -> Record:
    """Return the rows that the file has of cases that are not measured now."""
    content = build_provenance("benchmarks.composition", sys.argv[1:], runtime_s=0) | {"rows": []}
    if known is not None:
        measured = {tuple(_key(case).values()) for case in cases}
        keys = ("layout", "model", "lora")
        content["rows"] = [row for row in known.rows if tuple(row[k] for k in keys) not in measured]
        content["runtime_s"] = known.content["runtime_s"]
    return Record(RESULT, content)


if __name__ == "__main__":
    main()
