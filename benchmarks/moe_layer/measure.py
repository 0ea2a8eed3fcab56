"""Check and measure: on a GPU a contender of a case, on a CPU all of them in turns."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.harness.case import LayerShape
from benchmarks.harness.contender import Contender, SkippedError
from benchmarks.harness.device_timing import LEAST_REPEATS, REPEATS, WARMUPS, read_clocks, time_runs
from benchmarks.harness.memory import describe_method, measure_peak_bytes, measure_saved_bytes
from benchmarks.harness.outcome import MEASURED
from benchmarks.harness.timing import compare, spread, take_turns
from benchmarks.moe_layer.cases import CPU_SHAPES, FROZEN, FULL, LORA16, TINY, Case, order_cases
from benchmarks.moe_layer.check import (
    WrongError,
    check_contender,
    compute_expected,
    describe_check,
)
from benchmarks.moe_layer.contenders import CONTENDERS, CPU_CONTENDERS, OURS_GROUPED_MM
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
from benchmarks.moe_layer.inputs import LayerInputs, LayerWeights, draw_inputs, draw_weights

SKIPPED, WRONG, NO_MEMORY = "skipped", "wrong", "out of memory"
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


DTYPES = ("float32", "bfloat16")
CPU_METHOD = {
    "time": "seconds of a step (forward and the gradients of tokens, routing weights and what is "
    "trained) by the host's clock; the contenders take turns in an order that alternates, and a "
    "ratio (other / ours) compares turns of one round.",
    "check": describe_check(),
    "sides": "grouped_mm: DroplessExperts with our grouped_mm backend, ep 1. transformers: its own "
    "experts with grouped_mm, with split adapters (benchmarks/moe_layer/others.py) in lora modes. "
    "peft: target_parameters over the same.",
    **describe_memory(torch.device("cpu")),
}


@dataclass(frozen=True)
class CpuPlan:
    """What to measure, and how long."""

    shapes: tuple[LayerShape, ...]
    num_tokens: int
    rounds: int
    least_turn_s: float

    def cases(self) -> Iterator[Case]:
        """Yield every case, uniform routing."""
        for dtype in DTYPES:
            yield from order_cases(
                self.shapes, (FULL, FROZEN, LORA16), ("uniform",), self.num_tokens, dtype
            )


CPU_PLAN = CpuPlan(CPU_SHAPES, num_tokens=1024, rounds=15, least_turn_s=0.2)
QUICK_CPU_PLAN = CpuPlan((TINY,), num_tokens=600, rounds=3, least_turn_s=0.0)


def measure_cpu_case(case: Case, plan: CpuPlan) -> dict[str, Any]:
    """Check all contenders of a case, then measure their memory and, in turns, their time.

    Raises:
        WrongError: a contender gives other results than the layer's.
    """
    device = torch.device("cpu")
    weights, inputs = draw_weights(case, device), draw_inputs(case, device)
    contenders = _build_contenders(case, weights, inputs)
    expected = compute_expected(case, weights, inputs)
    used = {name: check_contender(one, expected) for name, one in contenders.items()}
    memory = {name: measure_memory(one, device) for name, one in contenders.items()}
    times, num_steps = take_turns(
        {name: one.step for name, one in contenders.items()},
        device,
        rounds=plan.rounds,
        least_turn_s=plan.least_turn_s,
    )
    return {
        "case": case.describe(),
        "used_of_bound": {name: max(values.values()) for name, values in used.items()},
        "memory": memory,
        "against": {
            name: compare(times, OURS_GROUPED_MM, name)
            for name in contenders
            if name != OURS_GROUPED_MM
        },
        "steps_per_turn": num_steps,
        "rounds": times,
    }


def _build_contenders(
    case: Case, weights: LayerWeights, inputs: LayerInputs
) -> dict[str, Contender]:
    contenders = {}
    for name, build in CPU_CONTENDERS.items():
        try:
            contenders[name] = build(case, weights, inputs)
        except SkippedError:  # PEFT in modes without adapters
            continue
    return contenders
