"""Tokens per second of our FSDP2 step against transformers' own expert parallelism, on CPU ranks.

    PYTHONPATH=. python -m benchmarks.end_to_end

The sides train in the same processes and take turns, a block of steps each, so that whatever else
the machine does hits all of them. Before anything is timed, the losses of the first steps must
agree. Each case has processes of its own.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.end_to_end.contenders import Case, OurSide, StockSide
from benchmarks.harness.provenance import build_provenance
from benchmarks.harness.workload import Workload, save_data, save_model

RESULTS = Path(__file__).parents[1] / "results" / "end_to_end_cpu.json"
SIDES = ("ours", "stock, packed", "stock, padded")
LOSS_TOLERANCE = 1e-4
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


@dataclass(frozen=True)
class Plan:
    """How long to measure: rounds of a block of steps each side, after warm-up steps each side."""

    rounds: int = 7
    steps_per_block: int = 2
    warmup_steps: int = 3

    @property
    def max_steps(self) -> int:
        """Steps each side takes in all."""
        return self.warmup_steps + self.rounds * self.steps_per_block


def compare_losses(rank: int, case: Case, workload: Workload, folder: str, steps: int) -> dict:
    """Train all sides for some steps and return the losses of each by name.

    **Collective:** every rank of an initialised world must call, with the launcher's environment.
    """
    sides = _build_sides(case, workload, Path(folder), max_steps=steps)
    return {name: [side.step() for _ in range(steps)] for name, side in sides.items()}


def measure(rank: int, case: Case, workload: Workload, folder: str, plan: Plan) -> dict:
    """Warm all sides up, check that they compute the same, and time them in turns.

    **Collective:** as `compare_losses`.

    Returns:
        `tokens` of each round; `padded_positions_per_token`; by side, `wall_s` and `cpu_s` (summed
        over ranks) of each round, and `first_losses`.

    Raises:
        RuntimeError: the sides' losses differ.
    """
    sides = _build_sides(case, workload, Path(folder), max_steps=plan.max_steps)
    losses = {name: [side.step() for _ in range(plan.warmup_steps)] for name, side in sides.items()}
    check_losses(losses)
    tokens = _tokens_per_round(sides["ours"], plan)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(plan.rounds):
        names = list(sides) if turn % 2 == 0 else list(reversed(sides))
        for name in names:
            times[name].append(_time_block(sides[name], plan.steps_per_block))
    return {
        "tokens": tokens,
        "padded_positions_per_token": _padding(*(sides[name] for name in SIDES[1:])),
        "first_losses": losses,
        "wall_s": {name: [wall for wall, _ in rows] for name, rows in times.items()},
        "cpu_s": {name: [cpu for _, cpu in rows] for name, rows in times.items()},
    }


def check_losses(losses: dict[str, list[float]]) -> None:
    """Raise RuntimeError if the sides do not compute the same thing."""
    for name, seen in losses.items():
        for ours, theirs in zip(losses["ours"], seen, strict=True):
            if abs(ours - theirs) > LOSS_TOLERANCE * abs(theirs):
                raise RuntimeError(f"the sides differ: ours {losses['ours']}, {name} {seen}")


def summarise(result: dict) -> dict:
    """Turn times into tokens per second of each side, and ratios of ours to each stock side.

    A ratio compares two blocks of the same round.
    """
    summary: dict[str, dict] = {"tokens_per_s": {}, "ratio": {}, "ratio_of_cpu_time": {}}
    for name, walls in result["wall_s"].items():
        rates = [t / wall for t, wall in zip(result["tokens"], walls, strict=True)]
        summary["tokens_per_s"][name] = spread(rates)
        if name == "ours":
            continue
        for measure_name, key in (("wall_s", "ratio"), ("cpu_s", "ratio_of_cpu_time")):
            pairs = zip(result[measure_name][name], result[measure_name]["ours"], strict=True)
            summary[key][name] = spread([theirs / ours for theirs, ours in pairs])
    return summary


def spread(values: list[float]) -> dict[str, float]:
    """Return n, median, least and largest."""
    return {"n": len(values), "median": median(values), "min": min(values), "max": max(values)}


def run_case(case: Case, workload: Workload, folder: Path, plan: Plan) -> dict:
    """Measure a case in processes of its own and return what rank 0 saw."""
    answer = folder / "answer.json"
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (case, workload, folder, plan, Path(meeting, "store"), answer)
        multiprocessing.spawn(_be_rank, arguments, nprocs=case.world_size)
    return json.loads(answer.read_text())


def main(argv: list[str]) -> None:
    """Run the cases; after each, write its row in place of an older one of the same case."""
    options = _parse(argv)
    plan = Plan(options.rounds, options.steps_per_block)
    workload, cases = Workload(), [case for case in CASES if options.only in case.label()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(workload, folder / "model")
        save_data(workload, folder / "data.jsonl")
        for case in cases:
            result = run_case(case, workload, folder, plan)
            certificate = build_provenance("benchmarks.end_to_end", argv)
            settings = {"workload": asdict(workload), "plan": asdict(plan)}
            row = {"case": asdict(case)} | certificate | settings | summarise(result)
            write_row(Path(options.output), row | {"rounds": result})
            sys.stdout.write(table_line(row) + "\n")
            sys.stdout.flush()


def write_row(path: Path, row: dict) -> None:
    """Put a row into the JSON file, in place of an older one of the same case."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [other for other in rows if other["case"] != row["case"]]
    kept = sorted([*kept, row], key=lambda r: list(map(str, r["case"].values())))
    path.write_text(json.dumps({"rows": kept}, indent=1) + "\n")


def table_line(row: dict) -> str:
    """Return a line of the Markdown table in `docs/benchmarks.md`."""
    case = row["case"]
    cells = [
        f"{case['world_size']}, ep {case['ep_size']}",
        "full" if case["use_lora"] == "none" else f"LoRA {case['use_lora']}",
        "full" if case["gradient_checkpointing"] == "True" else "none",
        *(f"{row['tokens_per_s'][side]['median']:.0f}" for side in SIDES),
        *(_cell(row["ratio"][side]) for side in SIDES[1:]),
        *(_cell(row["ratio_of_cpu_time"][side]) for side in SIDES[1:]),
    ]
    return "| " + " | ".join(cells) + " |"


def _cell(values: dict[str, float]) -> str:
    return f"**{values['median']:.2f}** ({values['min']:.2f}-{values['max']:.2f})"


def _build_sides(
    case: Case, workload: Workload, folder: Path, *, max_steps: int
) -> dict[str, OurSide | StockSide]:
    ours = OurSide(case, workload, folder, max_steps=max_steps)
    packed, padded = (
        StockSide(ours.schedule, ours.device, padded=padded) for padded in (False, True)
    )
    return dict(zip(SIDES, (ours, packed, padded), strict=True))


def _tokens_per_round(ours: OurSide, plan: Plan) -> list[int]:
    tokens = [step.num_input_tokens for _, step in ours.schedule.plans()]
    starts = range(plan.warmup_steps, plan.max_steps, plan.steps_per_block)
    return [sum(tokens[start : start + plan.steps_per_block]) for start in starts]


def _padding(packed: StockSide, padded: StockSide) -> float:
    positions = torch.tensor([packed.num_positions, padded.num_positions])
    dist.all_reduce(positions)
    return positions[1].item() / positions[0].item()


def _time_block(side: OurSide | StockSide, steps: int) -> tuple[float, float]:
    """Return wall seconds until the last rank is done, and CPU seconds of all ranks."""
    dist.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(steps):
        side.step()
    cpu_s = torch.tensor(time.process_time() - cpu_start, dtype=torch.float64)
    dist.all_reduce(cpu_s)  # waits for all ranks
    return time.perf_counter() - start, cpu_s.item()


def _be_rank(
    rank: int, case: Case, workload: Workload, folder: Path, plan: Plan, store: Path, answer: Path
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(case.world_size),
        LOCAL_WORLD_SIZE=str(case.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",  # read, but never opened: the ranks meet in a file
    )
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    dist.init_process_group(
        "gloo",
        init_method=store.as_uri(),
        rank=rank,
        world_size=case.world_size,
        timeout=timedelta(minutes=5),
    )
    result = measure(rank, case, workload, str(folder), plan)
    if rank == 0:
        answer.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--steps-per-block", type=int, default=2, help="steps of a turn")
    parser.add_argument("--only", default="", help="cases whose label holds this text")
    parser.add_argument("--output", default=RESULTS, help="the JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
