"""Our grouped_mm layer on a CPU against transformers' own experts, in turns in one process."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.case import LayerShape
from benchmarks.harness.contender import Contender, SkippedError
from benchmarks.harness.timing import compare, take_turns
from benchmarks.moe_layer.cases import CPU_SHAPES, FROZEN, FULL, LORA16, TINY, Case, order_cases
from benchmarks.moe_layer.check import check_contender, compute_expected, describe_check
from benchmarks.moe_layer.contenders import CPU_CONTENDERS, OURS_GROUPED_MM
from benchmarks.moe_layer.inputs import LayerInputs, LayerWeights, draw_inputs, draw_weights
from benchmarks.moe_layer.measure import describe_memory, measure_memory

DTYPES = ("float32", "bfloat16")
DESCRIPTION = {
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
