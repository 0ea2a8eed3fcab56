"""Check that the contenders of a case compute the same, and time them in turns."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.end_to_end.contenders import Case, OurStep, StockStep
from benchmarks.harness.timing import Times, compare_rounds, in_turn, spread
from benchmarks.harness.workload import Workload

OURS, PACKED, PADDED = NAMES = ("ours", "stock, packed", "stock, padded")
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Plan:
    """How long to measure: warm-up steps, then rounds of a block of steps, of each contender."""

    rounds: int = 7
    steps_per_block: int = 2
    warmup_steps: int = 3

    @property
    def max_steps(self) -> int:
        """Steps each contender takes in all."""
        return self.warmup_steps + self.rounds * self.steps_per_block


@dataclass(frozen=True)
class Contenders:
    """All contenders of a case."""

    ours: OurStep
    packed: StockStep
    padded: StockStep

    def named(self) -> dict[str, OurStep | StockStep]:
        """Return them by name."""
        return {OURS: self.ours, PACKED: self.packed, PADDED: self.padded}

    def train(self, steps: int) -> dict[str, list[float]]:
        """Train each for some steps and return the losses by name."""
        return {name: [one.step() for _ in range(steps)] for name, one in self.named().items()}


def build_contenders(case: Case, workload: Workload, folder: Path, max_steps: int) -> Contenders:
    """Build all contenders of a case.

    **Collective:** every rank of an initialised world must call, with the launcher's environment.
    """
    ours = OurStep(case, workload, folder, max_steps=max_steps)
    packed, padded = (
        StockStep(ours.schedule, ours.device, padded=padded) for padded in (False, True)
    )
    return Contenders(ours, packed, padded)


def measure(case: Case, workload: Workload, folder: Path, plan: Plan) -> dict[str, Any]:
    """Warm all contenders up, check that they compute the same, and time them in turns.

    **Collective:** as `build_contenders`.

    Returns:
        `tokens` of each round; `padded_positions_per_token`; by name, `wall_s` and `cpu_s` (summed
        over ranks) of each round, and `first_losses`.

    Raises:
        RuntimeError: the losses differ.
    """
    contenders = build_contenders(case, workload, folder, plan.max_steps)
    losses = contenders.train(plan.warmup_steps)
    check_losses(losses)
    times: Times = {key: {name: [] for name in NAMES} for key in ("wall_s", "cpu_s")}
    for turn in range(plan.rounds):
        for name in in_turn(NAMES, turn):
            block = _time_block(contenders.named()[name], plan.steps_per_block)
            for key, seconds in zip(times, block, strict=True):
                times[key][name].append(seconds)
    return {
        "tokens": _tokens_per_round(contenders.ours, plan),
        "padded_positions_per_token": _padding(contenders),
        "first_losses": losses,
        **times,
    }


def check_losses(losses: dict[str, list[float]]) -> None:
    """Raise RuntimeError if the contenders do not compute the same."""
    for name, found in losses.items():
        for ours, theirs in zip(losses[OURS], found, strict=True):
            if abs(ours - theirs) > LOSS_TOLERANCE * abs(theirs):
                raise RuntimeError(f"the losses differ: ours {losses[OURS]}, {name} {found}")


def summarise(result: dict[str, Any]) -> dict[str, dict]:
    """Turn times into tokens per second of each contender, and ratios of ours to each other.

    A ratio compares two blocks of the same round.
    """
    summary: dict[str, dict] = {"tokens_per_s": {}, "ratio": {}, "ratio_of_cpu_time": {}}
    for name, walls in result["wall_s"].items():
        rates = [t / wall for t, wall in zip(result["tokens"], walls, strict=True)]
        summary["tokens_per_s"][name] = spread(rates)
        if name != OURS:
            for ratio, key in (("ratio", "wall_s"), ("ratio_of_cpu_time", "cpu_s")):
                summary[ratio][name] = compare_rounds(result[key][OURS], result[key][name])
    return summary


def _tokens_per_round(ours: OurStep, plan: Plan) -> list[int]:
    tokens = [step.num_input_tokens for _, step in ours.schedule.plans()]
    starts = range(plan.warmup_steps, plan.max_steps, plan.steps_per_block)
    return [sum(tokens[start : start + plan.steps_per_block]) for start in starts]


def _padding(contenders: Contenders) -> float:
    positions = torch.tensor([contenders.packed.num_positions, contenders.padded.num_positions])
    dist.all_reduce(positions)
    return positions[1].item() / positions[0].item()


def _time_block(contender: OurStep | StockStep, steps: int) -> tuple[float, float]:
    """Return wall seconds until the last rank is done, and CPU seconds of all ranks."""
    dist.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(steps):
        contender.step()
    cpu_s = torch.tensor(time.process_time() - cpu_start, dtype=torch.float64)
    dist.all_reduce(cpu_s)  # waits for all ranks
    return time.perf_counter() - start, cpu_s.item()
