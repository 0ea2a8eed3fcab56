"""Check that the systems of a case compute the same of the same tokens, and time them in turns."""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.end_to_end.systems import StepTaken, System, SystemSpec
from benchmarks.harness.report import say
from benchmarks.harness.timing import compare_rounds, in_turn, spread

LOSS_BOUNDS: Mapping[str, float] = {"fp32": 1e-5, "bf16": 5e-3}
"""By precision: what the losses of two systems may differ by, relative."""


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        runs: how often all processes are started; the order of the systems alternates.
        rounds: turns of each system in a run.
        steps_per_turn: steps of a turn.
        warmup_steps: of each system, before its first turn: what is compared between systems.
    """

    runs: int = 2
    rounds: int = 2
    steps_per_turn: int = 1
    warmup_steps: int = 2

    @property
    def max_steps(self) -> int:
        """Steps each system takes in a run."""
        return self.warmup_steps + self.rounds * self.steps_per_turn


@dataclass(frozen=True)
class Machine:
    """What all systems of a case run on and with: processes, vocabulary, precision."""

    ranks: int
    vocab_size: int
    precision: str = "fp32"


class DifferentError(RuntimeError):
    """Report that two systems do not compute the same, so that their times mean nothing."""


def measure(specs: Sequence[SystemSpec], machine: Machine, plan: Plan) -> dict[str, Any]:
    """Run the systems of a case, all of whose processes live at once.

    Returns:
        By name of a system: `wall_s` and `cpu_s` of a turn's steps, in turns of all runs;
        `peak_bytes` (all ranks) of each run; `losses` of the warm-up. And `tokens_sha256` of those
        of the warm-up.

    Raises:
        DifferentError: the systems do not compute the same.
        SystemEndedError: a system has ended.
    """
    results = [_measure_run(in_turn(specs, run), machine, plan) for run in range(plan.runs)]
    merged: dict[str, Any] = {"losses": results[0]["losses"]}
    merged["tokens_sha256"] = results[0]["tokens_sha256"]
    for key in ("wall_s", "cpu_s", "peak_bytes"):
        merged[key] = {
            spec.name: [value for one in results for value in one[key][spec.name]] for spec in specs
        }
    return merged


def check_same(
    specs: Sequence[SystemSpec], steps: Mapping[str, Sequence[StepTaken]], bound: float
) -> str:
    """Check tokens and losses of the first steps against those of a system whose steps all count.

    Returns:
        The hash of the tokens.

    Raises:
        DifferentError: they differ.
    """
    first = next(spec.name for spec in specs if spec.compares_later_steps)
    for spec in specs:
        for place, (ours, theirs) in enumerate(zip(steps[first], steps[spec.name], strict=True)):
            if ours.tokens != theirs.tokens:
                raise DifferentError(
                    f"step {place + 1}: {spec.name} has other tokens than {first}: "
                    f"{sum(theirs.tokens or [])} and {sum(ours.tokens or [])} of them"
                )
            is_compared = place == 0 or spec.compares_later_steps
            if is_compared and not abs(ours.loss - theirs.loss) <= bound * abs(ours.loss):
                raise DifferentError(
                    f"step {place + 1}: the loss of {spec.name} is {theirs.loss}, that of {first} "
                    f"{ours.loss}; they may differ by {bound:g}"
                )
    counts = [step.tokens for step in steps[first]]
    return hashlib.sha256(repr(counts).encode()).hexdigest()


def summarise(result: Mapping[str, Any], tokens: Sequence[int], ours: str) -> dict[str, Any]:
    """Turn times into tokens per second, and into ratios of each system to ours.

    A ratio compares two turns of the same round; above 1 ours is faster, or needs less memory.

    Args:
        result: as `measure` returns it.
        tokens: of the steps of each turn.
        ours: name of the system that the others are compared with.
    """
    summary: dict[str, Any] = {"tokens_per_s": {}, "ratio": {}, "ratio_of_cpu_time": {}}
    summary |= {"peak_bytes": {}, "ratio_of_peak": {}}
    peaks = result["peak_bytes"]
    for name, walls in result["wall_s"].items():
        rates = [t / wall for t, wall in zip(tokens, walls, strict=True)]
        summary["tokens_per_s"][name] = spread(rates)
        summary["peak_bytes"][name] = spread(peaks[name])
        if name != ours:
            for ratio, key in (("ratio", "wall_s"), ("ratio_of_cpu_time", "cpu_s")):
                summary[ratio][name] = compare_rounds(result[key][ours], result[key][name])
            summary["ratio_of_peak"][name] = compare_rounds(peaks[ours], peaks[name])
    return summary


def _measure_run(specs: Sequence[SystemSpec], machine: Machine, plan: Plan) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        systems = [stack.enter_context(_start(spec, machine, folder)) for spec in specs]
        for system in systems:
            system.wait_until_ready()
        warm = {
            system.spec.name: [system.step(counts_tokens=True) for _ in range(plan.warmup_steps)]
            for system in systems
        }
        token_hash = check_same(specs, warm, LOSS_BOUNDS[machine.precision])
        say(f"{machine.ranks} ranks: the losses of {', '.join(warm)} agree")
        turns: dict[str, list[list[StepTaken]]] = {spec.name: [] for spec in specs}
        for turn in range(plan.rounds):
            for system in in_turn(systems, turn):
                taken = [system.step() for _ in range(plan.steps_per_turn)]
                turns[system.spec.name].append(taken)
    return {
        "losses": {name: [step.loss for step in steps] for name, steps in warm.items()},
        "tokens_sha256": token_hash,
        "wall_s": {name: [sum(s.wall_s for s in t) for t in all_] for name, all_ in turns.items()},
        "cpu_s": {name: [sum(s.cpu_s for s in t) for t in all_] for name, all_ in turns.items()},
        "peak_bytes": {name: [sum(all_[-1][-1].peak_bytes)] for name, all_ in turns.items()},
    }


def _start(spec: SystemSpec, machine: Machine, folder: Path) -> System:
    own = folder / str(len(list(folder.iterdir())))
    own.mkdir()
    return System(spec, machine.ranks, machine.vocab_size, own)
