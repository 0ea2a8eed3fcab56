"""The provenance of a run: what ran, on what, with which result (`run.json`)."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megablocks_utils.config.secrets import (
    find_secrets,
    is_secret_name,
    redact_record,
    redact_words,
)
from megablocks_utils.files import write_json_atomically
from megablocks_utils.training.report.memory import describe_memory_source
from megablocks_utils.training.report.metrics import RunTotals
from megablocks_utils.training.report.parameters import ParameterCounts

__all__ = ["CHECKOUT", "RunRecord", "build_provenance", "build_run_record", "describe_hardware"]
__all__ += ["read_commit", "read_versions", "write_run_json"]

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "safetensors")
CHECKOUT = Path(__file__).resolve().parents[3]
_SPEED_VARIABLES = ("OMP_", "MKL_", "MALLOC_")


@dataclass(frozen=True)
class RunRecord:
    """The content of `run.json`, key by key.

    Attributes:
        status: "finished"; a run that did not finish leaves no `run.json`.
        command: The script and its arguments, quoted for a shell.
        options: Every option by section, as given or by default.
        resolved: What the options resolve to on this machine (precision, ep_size, ...).
        versions: Python and libraries by name, None where not installed.
        commit: Git commit of this package, None outside a checkout.
        hardware: `cpu`, `cores`, `memory_bytes`, `gpus` (names) of this rank's machine.
        provenance: `command`, `commit`, `versions`, `hardware`, `environment` (variables that set
            speed) and `date` together, as results of benchmarks hold them.
        mesh: Ranks along each mesh axis, outermost first.
        kernel: `name`, `reason` and `probe`: what comparing it with eager found, see
            `moe.kernel_check.KernelCheck`; None where transformers runs the experts.
        parameters: `total`, `active`, `trainable`.
        train_runtime_s: Wall time of the training loop only.
        totals: `steps`, `tokens`, `input_tokens`.
        peaks: `mem_peak_bytes`, `mem_alloc_bytes` and what they `measured`.
        adapter_check: What comparing the written adapter with the trained one found, see
            `adapter_check.AdapterReport`; None without LoRA.
        plan: Memory predicted and measured, see `memory_check.MemoryCheck`.
        answer_end: What the data teaches as the end of an answer, see `answer_end.AnswerEnd`; None
            without a tokenizer.
        evaluation: The `first`, `last` and `best` evaluation, how many `examples` were held out and
            their `sha256`, `stopped_early_at_step` (None: not), `final_model_step`; None without.
    """

    status: str
    command: str
    options: dict[str, Any]
    resolved: dict[str, Any]
    versions: dict[str, str | None]
    commit: str | None
    hardware: dict[str, Any]
    provenance: dict[str, Any]
    mesh: dict[str, int]
    kernel: dict[str, Any]
    parameters: dict[str, int]
    train_runtime_s: float
    totals: dict[str, int]
    peaks: dict[str, int | str]
    adapter_check: dict[str, Any] | None
    plan: dict[str, Any] | None
    answer_end: dict[str, Any] | None
    evaluation: dict[str, Any] | None


def build_run_record(
    command: Sequence[str],
    options: Any,
    *,
    resolved: Mapping[str, Any],
    mesh: Mapping[str, int],
    kernel: str,
    kernel_reason: str,
    kernel_probe: Mapping[str, Any] | None,
    parameters: ParameterCounts,
    train_runtime_s: float,
    totals: RunTotals,
    device: torch.device,
    adapter_check: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
    answer_end: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Build the record of a finished run, adding versions, commit and hardware found here.

    Args:
        command: The script and its arguments (`sys.argv`).
        options: The `RunConfig`, or any dataclass.
        resolved: What the options resolve to on this machine; plain values only.
        mesh: Ranks along each axis, outermost first: `{"dp": 2, "ep": 4}`.
        kernel: The backend the experts ran on.
        kernel_reason: Why that one.
        kernel_probe: What comparing it with eager found; None if it is not this project's.
        parameters: Counts of the whole model.
        train_runtime_s: Wall time of the training loop only.
        totals: The run's steps added up.
        device: The device memory was measured on.
        adapter_check: What checking the written adapter found; None without LoRA.
        plan: Memory predicted and measured.
        answer_end: What the data teaches as the end of an answer.
        evaluation: What the evaluations have come to.
    """
    provenance = build_provenance(command)
    return RunRecord(
        status="finished",
        command=provenance["command"],
        options=redact_record(asdict(options)),
        resolved=dict(resolved),
        versions=provenance["versions"],
        commit=provenance["commit"],
        hardware=provenance["hardware"],
        provenance=provenance,
        mesh=dict(mesh),
        kernel={"name": kernel, "reason": kernel_reason, "probe": _plain(kernel_probe)},
        parameters=asdict(parameters),
        train_runtime_s=train_runtime_s,
        totals={name: getattr(totals, name) for name in ("steps", "tokens", "input_tokens")},
        peaks=_describe_peaks(totals, device),
        adapter_check=_plain(adapter_check),
        plan=_plain(plan),
        answer_end=_plain(answer_end),
        evaluation=_plain(evaluation),
    )


def _describe_peaks(totals: RunTotals, device: torch.device) -> dict[str, int | str]:
    return {
        "mem_peak_bytes": totals.mem_peak_bytes,
        "mem_alloc_bytes": totals.mem_alloc_bytes,
        "measured": describe_memory_source(device),
    }


def build_provenance(command: Sequence[str]) -> dict[str, Any]:
    """Say where a number comes from: its command, on what it ran, and when.

    Args:
        command: The program and its arguments.
    """
    return {
        "command": shlex.join(redact_words(command)),
        "commit": read_commit(CHECKOUT),
        "versions": read_versions(),
        "hardware": describe_hardware(),
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_SPEED_VARIABLES) and not is_secret_name(name)
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _plain(report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if report is None else dict(report)


def write_run_json(path: str | Path, record: RunRecord) -> None:
    """Write the record to `path`, complete or not at all, and without secrets. Rank 0 only.

    Raises:
        OSError: The folder cannot be written.
    """
    write_json_atomically(path, redact_record(asdict(record), find_secrets(sys.argv)))


def read_commit(folder: Path) -> str | None:
    """Return the git commit checked out in `folder`; None if it is no checkout or has no git."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def read_versions() -> dict[str, str | None]:
    """Return the versions of Python and the libraries, None for those not installed."""
    return {"python": platform.python_version()} | {
        library: _read_version(library) for library in LIBRARIES
    }


def _read_version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_hardware() -> dict[str, Any]:
    """Return processor, cores, memory and GPUs of this rank's machine."""
    return {
        "cpu": _read_cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _read_cpu_model(cpu_info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name, or its architecture where the system does not say."""
    if cpu_info.exists():
        for line in cpu_info.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
