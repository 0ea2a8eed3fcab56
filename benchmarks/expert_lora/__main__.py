"""LoRA on experts: our layer and training step against PEFT's own path, memory and time.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m benchmarks.expert_lora

Both sides live in one process, hold the same weights and adapters, and take turns. Before anything
is measured, their outputs and gradients must agree.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.expert_lora.adapters import ALPHA, OURS, PEFT, RANK, Side
from benchmarks.expert_lora.layer import build_layer_sides
from benchmarks.expert_lora.model import ModelShape, build_model_sides, with_logits
from benchmarks.expert_lora.tables import show_rows
from benchmarks.harness.case import Shape
from benchmarks.harness.memory import describe_method, measure_peak_bytes, measure_saved_bytes
from benchmarks.harness.processes import single_process
from benchmarks.harness.provenance import build_provenance
from benchmarks.harness.timing import compare, take_turns
from megablocks_utils.files import write_json_atomically

RESULTS = Path(__file__).parents[1] / "results" / "expert_lora.json"
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Plan:
    """What to measure: layers of each shape, token count and backend; models of each backend."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    model: ModelShape
    model_tokens: int
    backends: tuple[str, ...] = ("grouped_mm", "eager")
    rounds: int = 9
    least_turn_s: float = 0.25


FULL = Plan(
    shapes=(
        Shape("Mixtral-like", 1024, 3584, num_experts=8, top_k=2),
        Shape("Qwen3-MoE-like", 512, 192, num_experts=64, top_k=8),
    ),
    tokens=(128, 2048),
    model=ModelShape(Shape("Mixtral", 512, 1024, num_experts=8, top_k=2), 4, 4096),
    model_tokens=512,
)
QUICK = Plan(
    shapes=(Shape("tiny", 64, 96, num_experts=4, top_k=2),),
    tokens=(24,),
    model=ModelShape(Shape("tiny Mixtral", 64, 96, num_experts=4, top_k=2), 2, 128),
    model_tokens=24,
    rounds=3,
    least_turn_s=0.0,
)


def measure_agreement(ours: Mapping[str, Tensor], peft: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how far our results are from PEFT's: ||ours - peft|| / ||peft|| in fp64, by name.

    Raises:
        RuntimeError: they are not the same results, one is zero, or one differs by more than
            `TOLERANCE`.
    """
    if ours.keys() != peft.keys():
        raise RuntimeError(f"only one side has {sorted(ours.keys() ^ peft.keys())}")
    errors = {}
    for name, wanted in peft.items():
        norm = wanted.double().norm().item()
        if norm == 0:
            raise RuntimeError(f"{name} is zero, so its agreement would prove nothing")
        errors[name] = (ours[name].double() - wanted.double()).norm().item() / norm
        if not errors[name] <= TOLERANCE:
            raise RuntimeError(f"the sides differ in {name} by {errors[name]:.1e}")
    return errors


def measure_rows(plan: Plan, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure every layer and model of the plan, and yield a row for each."""
    for shape in plan.shapes:
        for num_tokens in plan.tokens:
            for backend in plan.backends:
                case = {"what": "layer", "tokens": num_tokens, "backend": backend} | asdict(shape)
                sides = build_layer_sides(shape, num_tokens, backend, device)
                yield measure_row(case, shape.experts_bytes, sides, sides, plan, device)
    model, num_tokens = plan.model, plan.model_tokens
    for backend in plan.backends:
        case = {"what": "model", "tokens": num_tokens, "backend": backend} | asdict(model.experts)
        case |= {"num_layers": model.num_layers, "vocab_size": model.vocab_size}
        sides = build_model_sides(model, num_tokens, backend, device)
        checked = {name: with_logits(side, model, num_tokens) for name, side in sides.items()}
        bytes_of_all = model.num_layers * model.experts.experts_bytes
        yield measure_row(case, bytes_of_all, sides, checked, plan, device)


def measure_row(
    case: dict[str, Any],
    experts_bytes: int,
    sides: Mapping[str, Side],
    checked: Mapping[str, Side],
    plan: Plan,
    device: torch.device,
) -> dict[str, Any]:
    """Check that both sides do the same work, then measure their memory and their time.

    Args:
        case: what is measured, for the row.
        experts_bytes: of all experts' weights.
        sides: what is measured, ours and PEFT's.
        checked: the same modules in a form that shows more than a loss.
        plan: how long to measure.
        device: where.
    """
    agreement = measure_agreement(*(checked[name].results() for name in (OURS, PEFT)))
    for side in (*checked.values(), *sides.values()):
        side.clear()
    saved = {n: measure_saved_bytes(side.forward, side.constants()) for n, side in sides.items()}
    peak = {name: _peak(side, device) for name, side in sides.items()}
    steps: dict[str, Callable] = {name: side.step for name, side in sides.items()}
    times, num_steps = take_turns(steps, device, rounds=plan.rounds, least_turn_s=plan.least_turn_s)
    return {
        "case": case,
        "agreement": agreement,
        "worst_disagreement": max(agreement.values()),
        "experts_bytes": experts_bytes,
        "saved_bytes": _with_ratio(saved),
        "peak_bytes": _with_ratio(peak),
        **compare(times, OURS, PEFT),
        "steps_per_turn": num_steps,
        "rounds": times,
    }


def main(argv: list[str]) -> None:
    """Measure, write after each row, show."""
    options = _parse(argv)
    plan = QUICK if options.quick else FULL
    output = options.output or (None if options.quick else RESULTS)
    device = torch.device(options.device)
    # The profiler that counts memory would otherwise write to standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    rows: list[dict[str, Any]] = []
    with single_process(device):
        for row in measure_rows(plan, device):
            rows.append(row)
            if output:
                write_json_atomically(output, _certificate(argv, plan, device) | {"rows": rows})
    show_rows(rows)


def _peak(side: Side, device: torch.device) -> int:
    side.step()  # an optimizer makes its states in the first step
    side.clear()
    peak = measure_peak_bytes(side.step, device)
    side.clear()
    return peak


def _with_ratio(values: dict[str, int]) -> dict[str, float]:
    return values | {"ratio": values[PEFT] / values[OURS]}


def _certificate(argv: list[str], plan: Plan, device: torch.device) -> dict[str, Any]:
    return build_provenance(
        "benchmarks.expert_lora",
        argv,
        device=str(device),
        threads=torch.get_num_threads(),
        dtype="float32",
        lora={"r": RANK, "lora_alpha": ALPHA},
        tolerance=TOLERANCE,
        plan=asdict(plan),
        method=describe_method(device)
        | {
            "time": "seconds of a step (forward and backward; of a model, AdamW over the adapters "
            "too); the sides take turns in an order that turns round, and a ratio (PEFT / ours) "
            "compares turns of one round.",
            "agreement": "||ours - peft|| / ||peft|| in fp64, adapters in PEFT's form.",
        },
    )


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help=f"the JSON file (default: {RESULTS.name})")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="tiny, and no file unless --output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
