"""Time two or more sides in turns, so that whatever else the machine does hits all of them."""

import time
from collections.abc import Callable, Mapping
from math import ceil
from statistics import median

import torch

Times = dict[str, dict[str, list[float]]]
"""`wall_s` and `cpu_s` -> side -> seconds of a step in each round."""


def spread(values: list[float]) -> dict[str, float]:
    """Return n, median, least and largest."""
    return {"n": len(values), "median": median(values), "min": min(values), "max": max(values)}


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    least_turn_s: float,
) -> tuple[Times, int]:
    """Time each side once a round, in an order that turns round from one to the next.

    Args:
        steps: the sides by name; each is warmed up with two steps.
        device: that is waited for at the ends of a turn.
        rounds: turns of each side.
        least_turn_s: a turn has so many steps, the same for all sides, that the quickest takes
            about this long.

    Returns:
        Seconds per step, and the number of steps in a turn.
    """
    warm = [[_time(step, 1, device)[0] for step in steps.values()] for _ in range(2)][-1]
    num_steps = max(1, ceil(least_turn_s / min(warm)))
    times: Times = {key: {name: [] for name in steps} for key in ("wall_s", "cpu_s")}
    for turn in range(rounds):
        for name in list(steps) if turn % 2 == 0 else list(reversed(steps)):
            for key, seconds in zip(times, _time(steps[name], num_steps, device), strict=True):
                times[key][name].append(seconds)
    return times, num_steps


def compare(times: Times, ours: str, other: str) -> dict[str, dict]:
    """Return spreads of both sides' times and of the ratios other / ours, round by round."""
    summary: dict[str, dict] = {}
    for key, ratio in (("wall_s", "ratio"), ("cpu_s", "ratio_of_cpu_time")):
        seen = times[key]
        summary[key] = {name: spread(seen[name]) for name in (ours, other)}
        summary[ratio] = spread([b / a for a, b in zip(seen[ours], seen[other], strict=True)])
    return summary


def _time(step: Callable[[], object], count: int, device: torch.device) -> tuple[float, float]:
    """Return wall and CPU seconds per step."""
    _wait(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    _wait(device)
    cpu_s = time.process_time() - cpu_start
    return (time.perf_counter() - start) / count, cpu_s / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
