"""What a run came to: its numbers, or why there are none."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.harness.launchers import Ending
from megablocks_utils.training.report.metrics import read_metrics

__all__ = [
    "FAILED",
    "LEFT_OUT",
    "MEASURED",
    "NOT_INSTALLED",
    "NOT_MEASURED",
    "OOM",
    "explain",
    "read_run",
]

MEASURED, OOM, FAILED = "measured", "OOM", "failed"
NOT_INSTALLED, LEFT_OUT, NOT_MEASURED = "not installed", "left out", "not measured"

_KILLED = -9
_NO_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|can't allocate memory|bad_alloc|MemoryError"
)
_LONGEST = 300


def read_run(folder: Path, *, warmup_steps: int, accumulation: int, ranks: int) -> dict[str, Any]:
    """Read the numbers of a run that has ended well.

    Args:
        folder: its `--output_dir`, with metrics.jsonl and run.json.
        warmup_steps: steps that are not counted in times.
        accumulation: micro-steps of a step.
        ranks: processes.

    Returns:
        `micro_step_s` and `tokens_per_s` (all ranks) of every measured step, `tokens_per_rank` of a
        micro-step; `peak_bytes` since the start and `allocated_bytes` after zero_grad, of the rank
        that had most; `first_loss`; `mesh` and `kernel`, as the run had them.
    """
    steps = read_metrics(folder / "metrics.jsonl")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    measured = steps[warmup_steps:]
    return {
        "status": MEASURED,
        "micro_step_s": [step.step_time_s / accumulation for step in measured],
        "tokens_per_s": [step.tokens_per_s for step in measured],
        "tokens_per_rank": measured[0].input_tokens // (accumulation * ranks),
        "peak_bytes": max(step.mem_peak_bytes for step in steps),
        "allocated_bytes": max(step.mem_alloc_bytes for step in measured),
        "first_loss": steps[0].loss,
        "mesh": record["mesh"],
        "kernel": record["kernel"]["name"],
    }


def explain(ending: Ending) -> dict[str, Any]:
    """Say why a run that ended badly has no numbers: out of memory, or its last words."""
    lines = [line.strip() for line in ending.words.splitlines() if line.strip()]
    # The last one: the lines of a traceback before it may hold the word too.
    out = next((line for line in reversed(lines) if _NO_MEMORY.search(line)), None)
    if out is None and ending.exit_code == _KILLED:
        out = "killed by the system (SIGKILL), as it does when the machine has no memory left"
    status, reason = (FAILED, lines[-1] if lines else "no message") if out is None else (OOM, out)
    return {"status": status, "reason": _shorten(reason), "exit_code": ending.exit_code}


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
