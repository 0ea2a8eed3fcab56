"""Part 2: whole runs of the scripts on one GPU, against the same runs on a CPU in fp32.

Losses and gradient norms of every step are compared. A run in a low precision may be off by three
times what the same precision is off by on the CPU with the plainest kernel: both are the largest of
a few random errors.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.gpu_check.dry_run import DRY_WORKLOAD
from benchmarks.gpu_check.part import Part, build_row
from benchmarks.gpu_check.programs import Finished, Program, name_folder
from benchmarks.harness.outcome import FAILED, LEFT_OUT, MEASURED, NOT_INSTALLED
from benchmarks.harness.processes import as_words
from benchmarks.harness.record import Row
from benchmarks.harness.workload import Workload, save_workload
from megablocks_utils.files import METRICS_NAME, RUN_RECORD_NAME
from megablocks_utils.kernels.backends.backend_table import BACKENDS
from megablocks_utils.kernels.shapes import name_dtype
from megablocks_utils.training.report.metrics import read_metrics

FSDP2, FSDP1 = "train_accelerate_fsdp2.py", "train_fsdp1.py"
PRECISIONS = ("fp32", "mixed", "bf16_sr", "bf16")
CHECKPOINTING = ("True", "False", "selective")
_SIZES = Workload(num_layers=4, longest_tokens=256, num_examples=256)
_STEPS, _DRY_STEPS = 5, 2
_RUN = "run"
_TIMEOUT_S = 150.0
_FACTOR = 3
_LEAST_ERROR: Mapping[str, float] = MappingProxyType({"loss": 1e-5, "grad_norm": 1e-4})
"""Of fp32, whose own error is not measured: the sums of a GPU have another order."""
_LEAST_LOW_ERROR: Mapping[str, float] = MappingProxyType({"loss": 5e-5, "grad_norm": 2e-3})
"""Of bfloat16, where the CPU's own may be small by luck."""


@dataclass(frozen=True)
class RunCase:
    """A run: its kernel and options; `options` are those that differ from the usual."""

    kernel: str
    precision: str
    checkpointing: str = "True"
    use_lora: str = "none"
    script: str = FSDP2
    options: tuple[tuple[str, object], ...] = ()
    on_cpu: bool = False

    @property
    def name(self) -> str:
        """Name the row."""
        words = [self.kernel, self.precision, f"checkpointing {self.checkpointing}"]
        words += [f"lora {self.use_lora}"] if self.use_lora != "none" else []
        words += ["fsdp1"] if self.script == FSDP1 else []
        words += [f"{name} {value}" for name, value in self.options]
        return f"{'reference' if self.on_cpu else 'run'}: {', '.join(words)}"

    def reference(self, precision: str | None = None) -> "RunCase":
        """Return the run on the CPU that it is compared with."""
        return RunCase(
            "eager", precision or self.precision, "True", use_lora=self.use_lora, on_cpu=True
        )


def list_cases() -> list[RunCase]:
    """Return all runs: kernels next to each other, so that an early end leaves some of each."""
    grid = [
        RunCase(kernel, precision, checkpointing)
        for checkpointing in CHECKPOINTING
        for precision in PRECISIONS
        for kernel in reversed(list(BACKENDS))
    ]
    adapters = [
        RunCase(kernel, "mixed", "selective", use_lora="all")
        for kernel in ("triton", "grouped_mm", "eager")
    ]
    other_script = [RunCase("triton", "bf16", "True", script=FSDP1)]
    compiled = [
        RunCase("triton", "bf16_sr", checkpointing, options=(("compile", True),))
        for checkpointing in CHECKPOINTING
    ]
    return [*grid, *adapters, *other_script, *compiled]


def list_dry_cases() -> list[RunCase]:
    """Return a run of each script: without compiled kernels, Triton's would take a minute."""
    return [
        RunCase("grouped_mm", "bf16_sr", "selective"),
        RunCase("grouped_mm", "fp32", "True", use_lora="all", script=FSDP1),
    ]


def run(part: Part) -> None:
    """Run the references, then every case."""
    cases = [case for case in _list_for(part) if part.is_wanted(case.name)]
    save_workload(DRY_WORKLOAD if part.is_dry else _SIZES, part.scratch)
    runnable = []
    for case in cases:
        row = find_unsupported(case)
        if row is None:
            runnable.append(case)
        else:
            part.add(row)
    references = list(dict.fromkeys(one for case in runnable for one in _references(case)))
    found = dict(_run_all(part, references))
    for case, row in _run_all(part, runnable):
        part.add(compare(case, row, found))


def find_unsupported(case: RunCase) -> Row | None:
    """Return the row of a case whose kernel is not here, or not made for it; None for others."""
    backend = BACKENDS[case.kernel]
    row: Row = {"name": case.name}
    if not backend.is_installed():
        return row | {"status": NOT_INSTALLED, "reason": f"install it with: {backend.install}"}
    dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
    if backend.dtypes is not None and dtype not in backend.dtypes:
        reason = f"{case.kernel} does not compute in {name_dtype(dtype)}"
        return row | {"status": LEFT_OUT, "reason": reason}
    return None


def compare(case: RunCase, row: Row, references: Mapping[RunCase, Row]) -> Row:
    """Return the row of a run with its errors and their bounds, failed where one is beyond."""
    if row["status"] != MEASURED:
        return row
    exact, same = (references.get(one) for one in _references(case))
    for reference in (exact, same):
        if reference is None or reference["status"] != MEASURED:
            return row | {"status": FAILED, "reason": "the run on the CPU to compare with failed"}
    assert exact is not None and same is not None
    least = _LEAST_ERROR if case.precision == "fp32" else _LEAST_LOW_ERROR
    errors = {key: worst_error(row[key], exact[key]) for key in least}
    bounds = {key: max(_FACTOR * worst_error(same[key], exact[key]), least[key]) for key in least}
    row = row | {"error": errors, "bound": bounds}
    for key, error in errors.items():
        if not error <= bounds[key]:
            reason = f"{key} is off by {error:.1e} of the CPU's, but it may be {bounds[key]:.1e}"
            return row | {"status": FAILED, "reason": reason}
    return row


def worst_error(found: list[float], exact: list[float]) -> float:
    """Return the largest relative difference of two runs' steps."""
    pairs = zip(found, exact, strict=True)
    return max(abs(one - other) / abs(other) for one, other in pairs)


def read_run(finished: Finished) -> Row:
    """Read what a run left, and remove it."""
    folder = finished.folder / _RUN
    steps = read_metrics(folder / METRICS_NAME)
    record = json.loads((folder / RUN_RECORD_NAME).read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return {
        "kernel": record["kernel"],
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "step_time_s": [step.step_time_s for step in steps],
        "peak_bytes": max(step.mem_peak_bytes for step in steps),
    }


def _list_for(part: Part) -> list[RunCase]:
    return list_dry_cases() if part.is_dry else list_cases()


def _references(case: RunCase) -> tuple[RunCase, RunCase]:
    """Return the exact run on the CPU, and the one in the precision of the case."""
    return case.reference("fp32"), case.reference()


def _run_all(part: Part, cases: list[RunCase]) -> Iterator[tuple[RunCase, Row]]:
    by_name = {case.name: case for case in cases}
    programs = [_program(part, case) for case in cases]
    for finished in part.each(programs, jobs=part.jobs):
        case = by_name[finished.program.name]
        row = build_row(finished, read_run)
        if case.on_cpu:
            part.add(row)
        yield case, row


def _program(part: Part, case: RunCase) -> Program:
    words = as_words(_arguments(part, case))
    threads = max(1, (os.cpu_count() or 1) // part.jobs)
    return Program(
        case.name,
        (case.script, *words),
        _TIMEOUT_S,
        hides_gpu=case.on_cpu or part.is_dry,
        environment={"OMP_NUM_THREADS": str(threads)},
    )


def _arguments(part: Part, case: RunCase) -> dict[str, Any]:
    sizes = DRY_WORKLOAD if part.is_dry else _SIZES
    options: dict[str, Any] = {
        "model_name_or_path": part.scratch / "model",
        "data_path": part.scratch / "data.jsonl",
        "output_dir": part.folder / name_folder(case.name) / _RUN,
        "use_megablocks_sharding": True,
        "ep_size": 1,
        "kernel": case.kernel,
        "precision": case.precision,
        "gradient_checkpointing": case.checkpointing,
        "use_lora": case.use_lora,
        "per_device_train_batch_size": sizes.per_device_batch,
        "gradient_accumulation_steps": sizes.global_batch // sizes.per_device_batch,
        "max_steps": _DRY_STEPS if part.is_dry else _STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "verify_adapter": False,
        "overwrite_output_dir": True,
    }
    return options | dict(case.options)
