"""Check and measure one contender of one case; a failure is a result that says why."""

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.harness.contender import Contender, SkippedError
from benchmarks.harness.device_timing import LEAST_REPEATS, REPEATS, WARMUPS, read_clocks, time_runs
from benchmarks.harness.memory import describe_method, measure_peak_bytes, measure_saved_bytes
from benchmarks.harness.outcome import MEASURED
from benchmarks.harness.timing import spread
from benchmarks.moe_layer.cases import Case
from benchmarks.moe_layer.check import WrongError, check_contender, compute_expected
from benchmarks.moe_layer.contenders import CONTENDERS
from benchmarks.moe_layer.floor import (
    H100,
    Machine,
    adapter_flops,
    forward_floor_s,
    forward_flops,
    least_saved_bytes,
    step_floor_s,
    step_flops,
)
from benchmarks.moe_layer.inputs import draw_inputs, draw_weights

SKIPPED, WRONG, NO_MEMORY, NOT_REACHED = "skipped", "wrong", "out of memory", "not reached"
PHASES = ("forward", "forward_backward")


@dataclass(frozen=True)
class Effort:
    """How long to time: warm-ups and runs of each phase."""

    warmups: int = WARMUPS
    repeats: int = REPEATS


QUICK = Effort(warmups=1, repeats=LEAST_REPEATS)


def measure_case(
    name: str, case: Case, machine: Machine, device: torch.device, effort: Effort
) -> dict[str, Any]:
    """Return the row of a contender: a measurement, or why there is none."""
    row = {"side": name, "case": case.describe()}
    try:
        return row | {"status": MEASURED} | _measure(name, case, machine, device, effort)
    except SkippedError as reason:
        return row | {"status": SKIPPED, "reason": str(reason)}
    except WrongError as reason:
        return row | {"status": WRONG, "reason": str(reason)}
    except torch.OutOfMemoryError as reason:
        return row | {"status": NO_MEMORY, "reason": str(reason).split(" GPU ")[0]}
    finally:
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def derive(case: Case, times_ms: dict[str, dict[str, float]], machine: Machine) -> dict[str, Any]:
    """Return rates and shares of a measurement, by phase.

    `tflops` counts the useful work of the experts alone, `floor_h100_ms` is for the H100 that the
    aims are stated for, `floor_here_ms` for the rates measured on this machine.
    """
    shape, tokens, mode = case.shape, case.num_tokens, case.mode
    itemsize = getattr(torch, case.dtype).itemsize
    flops = {
        "forward": forward_flops(shape, tokens),
        "forward_backward": step_flops(shape, tokens, mode),
    }
    derived: dict[str, Any] = {"adapter_flops": adapter_flops(shape, tokens, mode)}
    for phase in PHASES:
        seconds = times_ms[phase]["median"] / 1e3
        floors = {
            key: forward_floor_s(shape, tokens, where, itemsize)
            if phase == "forward"
            else step_floor_s(shape, tokens, mode, where, itemsize)
            for key, where in (("h100", H100), ("here", machine))
        }
        derived[phase] = {
            "useful_flops": flops[phase],
            "tflops": flops[phase] / seconds / 1e12,
            "share_of_peak": flops[phase] / seconds / machine.flops_per_s,
        }
        for key, floor in floors.items():
            derived[phase] |= {f"floor_{key}_ms": 1e3 * floor, f"share_{key}": floor / seconds}
    return derived


def describe_memory(device: torch.device) -> dict[str, str]:
    """Say what the two measures of memory count."""
    return describe_method(device) | {
        "saved_bytes": "the storages of all tensors that autograd saved in a forward pass "
        "(torch.autograd.graph.saved_tensors_hooks), each distinct storage once and whole, without "
        "those of parameters; the layer's tokens count where they are saved."
    }


def _measure(
    name: str, case: Case, machine: Machine, device: torch.device, effort: Effort
) -> dict[str, Any]:
    weights, inputs = draw_weights(case, device), draw_inputs(case, device)
    contender = CONTENDERS[name](case, weights, inputs)
    used = check_contender(contender, compute_expected(case, weights, inputs))
    memory = measure_memory(contender, device)
    clocks = read_clocks(device)
    runs: dict[str, Callable[[], object]] = {
        "forward": contender.forward,
        "forward_backward": contender.step,
    }
    times = {phase: spread(time_runs(run, device, **asdict(effort))) for phase, run in runs.items()}
    return {
        "note": contender.note,
        "ms": times,
        "derived": derive(case, times, machine),
        **memory,
        "least_saved_bytes": least_saved_bytes(
            case.shape, case.num_tokens, inputs.tokens.element_size()
        ),
        "used_of_bound": used,
        "clocks": {"before": clocks, "after": read_clocks(device)},
    }


def measure_memory(contender: Contender, device: torch.device) -> dict[str, int]:
    """Return the bytes a forward pass saves and the most a step holds at once.

    Tokens count as saved where the layer saves them: they are the previous layer's result, which
    nothing else may need.
    """
    contender.step()
    return {
        "saved_bytes": measure_saved_bytes(contender.forward, contender.constants),
        "peak_bytes": measure_peak_bytes(contender.step, device),
    }
