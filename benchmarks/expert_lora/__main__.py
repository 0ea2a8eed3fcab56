"""LoRA on experts: our layer and training step against PEFT's own path, memory and time.

    PYTHONPATH=. OMP_NUM_THREADS=1 python -m benchmarks.expert_lora

Both contenders live in one process, hold the same weights and adapters, and take turns. Before
anything is measured, their outputs and gradients must agree.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.expert_lora.adapters import ALPHA, OURS, PEFT, RANK
from benchmarks.expert_lora.layer import build_layers
from benchmarks.expert_lora.model import ModelSizes, build_models
from benchmarks.harness.case import LayerShape
from benchmarks.harness.contender import Contender
from benchmarks.harness.memory import describe_method, measure_peak_bytes, measure_saved_bytes
from benchmarks.harness.processes import single_process
from benchmarks.harness.provenance import RESULTS, build_provenance
from benchmarks.harness.record import Record, Row
from benchmarks.harness.report import format_spread, markdown_table, show
from benchmarks.harness.timing import compare, take_turns

RESULT = RESULTS / "expert_lora.json"
TOLERANCE = 1e-5
_MIB = 1024**2
_CASE = ("case", "tokens", "backend")
_MEMORY = (
    *("experts' weights, MiB", "saved, MiB: ours", "PEFT", "ratio", "peak, MiB: ours"),
    *("PEFT", "ratio"),
)
_TIME = ("ours, ms", "PEFT, ms", "PEFT / ours", "CPU time", "worst disagreement")


@dataclass(frozen=True)
class Plan:
    """What to measure: layers of each shape, token count and backend; models of each backend."""

    shapes: tuple[LayerShape, ...]
    tokens: tuple[int, ...]
    model: ModelSizes
    model_tokens: int
    backends: tuple[str, ...] = ("grouped_mm", "eager")
    rounds: int = 9
    least_turn_s: float = 0.25


FULL = Plan(
    shapes=(
        LayerShape("Mixtral-like", 1024, 3584, num_experts=8, top_k=2),
        LayerShape("Qwen3-MoE-like", 512, 192, num_experts=64, top_k=8),
    ),
    tokens=(128, 2048),
    model=ModelSizes(LayerShape("Mixtral", 512, 1024, num_experts=8, top_k=2), 4, 4096),
    model_tokens=512,
)
QUICK = Plan(
    shapes=(LayerShape("tiny", 64, 96, num_experts=4, top_k=2),),
    tokens=(24,),
    model=ModelSizes(LayerShape("tiny Mixtral", 64, 96, num_experts=4, top_k=2), 2, 128),
    model_tokens=24,
    rounds=3,
    least_turn_s=0.0,
)


def measure_agreement(ours: Mapping[str, Tensor], peft: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how far our results are from PEFT's: ||ours - peft|| / ||peft|| in fp64, by name.

    Raises:
        RuntimeError: they have other names, one is zero, or one differs by more than
            `TOLERANCE`.
    """
    if ours.keys() != peft.keys():
        raise RuntimeError(f"only one contender has {sorted(ours.keys() ^ peft.keys())}")
    errors = {}
    for name, wanted in peft.items():
        norm = wanted.double().norm().item()
        if norm == 0:
            raise RuntimeError(f"{name} is zero, so its agreement would prove nothing")
        errors[name] = (ours[name].double() - wanted.double()).norm().item() / norm
        if not errors[name] <= TOLERANCE:
            raise RuntimeError(f"the results differ in {name} by {errors[name]:.1e}")
    return errors


def measure_rows(plan: Plan, device: torch.device) -> Iterator[Row]:
    """Measure every layer and model of the plan, and yield a row for each."""
    for shape, num_tokens, backend in product(plan.shapes, plan.tokens, plan.backends):
        case = {"what": "layer", "tokens": num_tokens, "backend": backend} | asdict(shape)
        layers = build_layers(shape, num_tokens, backend, device)
        yield measure_row(case, shape.experts_bytes, layers, layers, plan, device)
    model, num_tokens = plan.model, plan.model_tokens
    for backend in plan.backends:
        case = {"what": "model", "tokens": num_tokens, "backend": backend} | asdict(model.experts)
        case |= {"num_layers": model.num_layers, "vocab_size": model.vocab_size}
        models = build_models(model, num_tokens, backend, device)
        bytes_of_all = model.num_layers * model.experts.experts_bytes
        yield measure_row(case, bytes_of_all, models.steps, models.passes, plan, device)


def measure_row(
    case: dict[str, Any],
    experts_bytes: int,
    steps: Mapping[str, Contender],
    checked: Mapping[str, Contender],
    plan: Plan,
    device: torch.device,
) -> Row:
    """Check that both contenders do the same work, then measure their memory and their time.

    Args:
        case: what is measured, for the row.
        experts_bytes: of all experts' weights.
        steps: what is measured, ours and PEFT's.
        checked: the same modules in a form that shows more than a loss.
        plan: how long to measure.
        device: where.
    """
    agreement = measure_agreement(*(checked[name].results() for name in (OURS, PEFT)))
    saved = {name: measure_saved_bytes(one.forward, one.constants) for name, one in steps.items()}
    peak = {name: _peak(one, device) for name, one in steps.items()}
    times, num_steps = take_turns(
        {name: one.step for name, one in steps.items()},
        device,
        rounds=plan.rounds,
        least_turn_s=plan.least_turn_s,
    )
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


def format_tables(rows: list[Row]) -> str:
    """Return a table of memory and one of time, ratios PEFT / ours."""
    memory = [[*_case_cells(row), *_memory_cells(row)] for row in rows]
    times = [[*_case_cells(row), *_time_cells(row)] for row in rows]
    tables = [
        markdown_table((*_CASE, *columns), cells, len(_CASE))
        for columns, cells in ((_MEMORY, memory), (_TIME, times))
    ]
    return "\n\n".join(tables)


def main(argv: list[str]) -> None:
    """Measure, write after each row, show."""
    options = _parse(argv)
    plan = QUICK if options.quick else FULL
    output = options.output or (None if options.quick else RESULT)
    device = torch.device(options.device)
    # The profiler that counts memory would otherwise write to standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    record = Record(output, _provenance(argv, plan, device))
    with single_process(device):
        for row in measure_rows(plan, device):
            record.add(row)
    show(format_tables(record.rows))


def _peak(contender: Contender, device: torch.device) -> int:
    contender.step()  # an optimizer makes its states in the first step
    return measure_peak_bytes(contender.step, device)


def _with_ratio(values: dict[str, int]) -> dict[str, float]:
    return values | {"ratio": values[PEFT] / values[OURS]}


def _provenance(argv: list[str], plan: Plan, device: torch.device) -> dict[str, Any]:
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
            "too); the contenders take turns in an order that alternates, and a ratio "
            "(PEFT / ours) compares turns of one round.",
            "agreement": "||ours - peft|| / ||peft|| in fp64, adapters in PEFT's form.",
        },
    )


def _memory_cells(row: Row) -> list[str]:
    cells = [_mib(row["experts_bytes"])]
    for key in ("saved_bytes", "peak_bytes"):
        values = row[key]
        cells += [_mib(values[OURS]), _mib(values[PEFT]), f"{values['ratio']:.2f}"]
    return cells


def _time_cells(row: Row) -> list[str]:
    times = [f"{1000 * row['wall_s'][name]['median']:.1f}" for name in (OURS, PEFT)]
    ratios = [format_spread(row[key]) for key in ("ratio", "ratio_of_cpu_time")]
    return [*times, *ratios, f"{row['worst_disagreement']:.1e}"]


def _case_cells(row: Row) -> list[str]:
    case = row["case"]
    return [f"{case['name']} {case['what']}", str(case["tokens"]), case["backend"]]


def _mib(size: int) -> str:
    return f"{size / _MIB:.2f}" if size < _MIB else f"{size / _MIB:.1f}"


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help=f"the JSON file (default: {RESULT.name})")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="tiny, and no file unless --output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
