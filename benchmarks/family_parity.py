"""How far runs of five families are from one process of stock transformers, and what they leave.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m benchmarks.family_parity [FAMILY ...]

For each family: 20 steps with accumulation 4 in both scripts at ep 2 and 4 on 4 CPU ranks, of all
weights and of adapters on attention and experts; a checkpoint that goes on in another layout and
script; and its export, which plain transformers loads. About 25 minutes on two cores. Writes
benchmarks/results/family_parity_cpu.json and prints Markdown tables. Ends with exit code 1 if a
bound does not hold.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product

from transformers import AutoModelForCausalLM

from benchmarks.harness.provenance import RESULTS, build_provenance
from benchmarks.harness.rank_pools import finish, open_rank_pools
from benchmarks.harness.record import Record, Row
from benchmarks.harness.report import group_rows, markdown_table, say
from benchmarks.lora_parity import MAX_EXCESS, OWN_EXPERT_DP, TRAIN
from benchmarks.parity import BOUND, MEASURED, describe_case, worst_of
from benchmarks.reshard import ERRORS, measure_pair
from megablocks_utils.export import export_checkpoint, parse_options
from tests.support.parity import Layout, ParityCase, ParityFolder, run_case
from tests.support.rank_pool import RankPool
from tests.support.resuming import Run, SavedRun, make_run, run_and_save
from tests.support.trace import measure_distance, measure_excess

RESULT = RESULTS / "family_parity_cpu.json"
FAMILIES = ("gpt_oss", "deepseek_v3", "qwen3_5_moe_text", "gemma4_text", "glm4_moe")
EP_SIZES = (2, 4)
LORA = ("none", "all")
# At 1e-3 nothing compares for Qwen3.5, whose gradients have norms of 45: after 20 steps stock in
# fp32 is 7.5e-2 from itself in fp64.
LEARNING_RATE = 1e-4
# What fp32 of stock itself is away from fp64 counts where that is more than the bound.
EXCEEDING = ("loss", "grad_norm", "first_gradient")


def cases(family: str) -> Iterator[tuple[str, ParityCase]]:
    """Yield script and case."""
    for script, ep_size, lora in product(TRAIN, EP_SIZES, LORA):
        layout = Layout(4, ep_size, OWN_EXPERT_DP[script])
        options = {"accumulation": 4, "learning_rate": LEARNING_RATE}
        yield script, ParityCase(layout, family, lora=lora, lora_rank=4, **options)


def measure_steps(
    pools: Mapping[int, RankPool], folder: ParityFolder, families: Sequence[str]
) -> list[Row]:
    """Run all cases and return a row for each: its options and its worst relative differences.

    Keys that begin with `stock_` are the distance of fp32 stock from fp64 stock.
    """
    rows = []
    for script, case in (item for family in families for item in cases(family)):
        started = time.monotonic()
        wanted = folder.reference(folder.stock_run(case))
        exact = folder.reference(folder.stock_run(case, "float64"))
        row = {"script": script} | describe_case(case)
        stock = measure_distance(wanted, exact)
        row |= {f"stock_{name}": getattr(stock, name) for name in EXCEEDING}
        seen = run_case(pools, folder, case, TRAIN[script])
        row |= asdict(measure_distance(seen, wanted))
        row["weight_excess"] = measure_excess(seen, wanted, exact, floor=BOUND)
        rows.append(row)
        worst = ", ".join(f"{name} {row[name]:.1e}" for name in MEASURED)
        say(f"{script}, {case}: {worst} ({time.monotonic() - started:.1f} s)")
    return rows


def measure_resumes(
    pools: Mapping[int, RankPool], folder: ParityFolder, families: Sequence[str]
) -> list[Row]:
    """Save in one layout and go on in others, of both scripts; return a row for each pair."""
    rows = []
    for family, lora in product(families, LORA):
        source = make_run("fsdp2", Layout(4, 2), model=family, lora=lora, lora_rank=4)
        saved = run_and_save(pools, folder, source, folder.folder / f"saved {family} {lora}")
        targets = [
            make_run("fsdp2", Layout(2, 2)),
            make_run("fsdp1", Layout(4, 4, "replicate")),
            make_run("fsdp2", Layout(1, 1)),
        ]
        for target in targets:
            row = {"model": family, "lora": lora, "resumed": f"{target.script} {target.layout}"}
            row |= measure_pair(pools, folder, saved, source.on(target))
            rows.append(row)
            say(", ".join(f"{name} {value}" for name, value in row.items()))
        if lora == "none":
            rows.append({"model": family, "lora": lora} | measure_export(folder, source, saved))
            say(str(rows[-1]))
    return rows


def measure_export(folder: ParityFolder, source: Run, saved: SavedRun) -> Row:
    """Export the checkpoint, load it with plain transformers, and compare every weight."""
    output = folder.folder / f"exported {source.case.model}"
    words = ["--checkpoint", str(saved.checkpoint), "--output", str(output)]
    export_checkpoint(parse_options(words))
    weights = dict(AutoModelForCausalLM.from_pretrained(output).named_parameters())
    wanted = {
        name.removeprefix("model."): tensor
        for name, tensor in saved.state.items()
        if name.startswith("model.")
    }
    errors = [float((weights[name] - wanted[name]).abs().max()) for name in weights]
    return {"exported": str(len(errors)), "weights": max(errors)}


def format_tables(steps: list[Row], resumes: list[Row]) -> str:
    """Return both results as Markdown: the worst over the layouts of a family and script."""
    worst = [
        [model, script, lora, str(len(rows)), *worst_of(rows)]
        for (model, script, lora), rows in group_rows(steps, "model", "script", "lora").items()
    ]
    columns = ("family", "script", "adapters", "runs", *MEASURED)
    errors = [
        [
            row["model"],
            row["lora"],
            row.get("resumed", "exported, loaded by transformers"),
            f"{row['weights']:g}",
            f"{row['loss']:.1e}" if "loss" in row else "",
        ]
        for row in resumes
    ]
    resumed = ("family", "adapters", "goes on as", "error of weights", "next losses")
    return "\n\n".join(
        [markdown_table(columns, worst, num_left=3), markdown_table(resumed, errors, num_left=3)]
    )


def find_violations(steps: list[Row], resumes: list[Row]) -> list[str]:
    """Name every row that breaks a bound."""
    violations = [
        f"parity: {row}"
        for row in steps
        if any(row[name] >= max(BOUND, MAX_EXCESS * row[f"stock_{name}"]) for name in EXCEEDING)
        or (row["weight"] >= BOUND and row["weight_excess"] >= MAX_EXCESS)
    ]
    violations += [
        f"resume: {row}"
        for row in resumes
        if any(row.get(name, 0.0) for name in ERRORS)
        or any(row.get(name, 0.0) > _bound(steps, row, name) for name in ("loss", "grad_norm"))
    ]
    return violations


def _bound(steps: list[Row], resume: Row, name: str) -> float:
    """Return how far runs that went on may be apart: layouts round as differently as precisions."""
    kind = resume["model"], resume["lora"]
    same = [row for row in steps if (row["model"], row["lora"]) == kind]
    return max(BOUND, *(MAX_EXCESS * row[f"stock_{name}"] for row in same))


def main() -> None:
    """Measure, write, show, judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", default=FAMILIES, metavar="FAMILY")
    families = parser.parse_args().families
    provenance = build_provenance("benchmarks.family_parity", sys.argv[1:])
    steps: list[Row] = []
    resumes: list[Row] = []
    started = time.monotonic()
    with open_rank_pools(1, 2, 4) as (pools, folder):
        for family in families:  # written after each, since all of them take long
            steps += measure_steps(pools, folder, [family])
            resumes += measure_resumes(pools, folder, [family])
            runtime_s = round(time.monotonic() - started)
            content = provenance | {"runtime_s": runtime_s, "steps": steps, "resumes": resumes}
            Record(RESULT, content).write()
    finish(RESULT, content, format_tables(steps, resumes), find_violations(steps, resumes))


if __name__ == "__main__":
    main()
