"""Time contenders in turns, so that whatever else the machine does hits all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from statistics import median
from typing import TypeVar

import torch

Times = dict[str, dict[str, list[float]]]
"""`wall_s` and `cpu_s` -> contender -> seconds of a step in each round."""

Item = TypeVar("Item")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return n, median, minimum and maximum."""
    return {"n": len(values), "median": median(values), "min": min(values), "max": max(values)}


def in_turn(items: Sequence[Item], turn: int) -> list[Item]:
    """Return the items in the order of a round: every second round is backwards."""
    return list(items) if turn % 2 == 0 else list(reversed(items))


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    least_turn_s: float,
) -> tuple[Times, int]:
    """Time each contender once a round, in an order that alternates from one to the next.

    Args:
        steps: of the contenders by name; each is warmed up with two.
        device: that is waited for at the ends of a turn.
        rounds: turns of each contender.
        least_turn_s: seconds of a turn of the fastest contender, at least; all contenders take the
            same number of steps.

    Returns:
        Seconds per step, and the number of steps in a turn.
    """
    warm = [[_time(step, 1, device)[0] for step in steps.values()] for _ in range(2)][-1]
    num_steps = max(1, ceil(least_turn_s / min(warm)))
    times: Times = {key: {name: [] for name in steps} for key in ("wall_s", "cpu_s")}
    for turn in range(rounds):
        for name in in_turn(list(steps), turn):
            for key, seconds in zip(times, _time(steps[name], num_steps, device), strict=True):
                times[key][name].append(seconds)
    return times, num_steps


def compare(times: Times, ours: str, other: str) -> dict[str, dict]:
    """Return spreads of both contenders' times, and `compare_rounds` of wall and CPU time."""
    summary: dict[str, dict] = {}
    for key, ratio in (("wall_s", "ratio"), ("cpu_s", "ratio_of_cpu_time")):
        seconds = times[key]
        summary[key] = {name: spread(seconds[name]) for name in (ours, other)}
        summary[ratio] = compare_rounds(seconds[ours], seconds[other])
    return summary


def compare_rounds(ours: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Return the spread of other / ours, round by round."""
    return spread([b / a for a, b in zip(ours, other, strict=True)])


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time(step: Callable[[], object], count: int, device: torch.device) -> tuple[float, float]:
    """Return wall and CPU seconds per step."""
    wait_for(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    wait_for(device)
    cpu_s = time.process_time() - cpu_start
    return (time.perf_counter() - start) / count, cpu_s / count
