"""Memory of a row on one device: rank 0 with fake peers and real tensors, in a fresh process.

python -m benchmarks.table.one_gpu < request.json
"""

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from benchmarks.harness.memory import reset_peak_resident
from benchmarks.harness.outcome import LEFT_OUT, MEASURED, Ending, explain
from benchmarks.harness.provenance import ROOT
from benchmarks.table.bench import Bench
from benchmarks.table.rows import TRANSFORMERS, Row
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.processes.freed_memory import give_back_freed_memory
from megablocks_utils.rehearsal.worker import build_request, read_request

MODULE = "benchmarks.table.one_gpu"
Start = Callable[[str], subprocess.CompletedProcess[str]]
_TIMEOUT_S = 1800.0


def rehearse_row(
    row: Row, bench: Bench, folder: Path, start: Start | None = None
) -> dict[str, Any]:
    """Measure a row's memory in a process of its own.

    Args:
        row: which.
        bench: how.
        folder: holds the model's config.json.
        start: gives the request to a process that calls `main`; None: a new one.

    Returns:
        `peak_bytes` of a step and `allocated_bytes` after it, of tensors alone; or why there are
        none.
    """
    if row.group == TRANSFORMERS:
        reason = "transformers' own expert parallelism cannot be rehearsed with fake peers"
        return {"status": LEFT_OUT, "reason": reason}
    scenario = bench.scenario(row)
    try:
        done = (start or _start_process)(
            build_request(folder, scenario.own_layout(), scenario.planned_run())
        )
    except subprocess.TimeoutExpired:
        return explain(Ending.after_timeout(_TIMEOUT_S))
    if done.returncode != 0:
        return explain(Ending(done.returncode, done.stderr))
    return {"status": MEASURED} | json.loads(done.stdout.splitlines()[-1])


def _start_process(request: str) -> subprocess.CompletedProcess[str]:
    """Run `main` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", MODULE],
        input=request,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )


def main(argv: list[str], source: TextIO = sys.stdin, answer: TextIO = sys.stdout) -> None:
    """Rehearse a step on real tensors, and write what the device held.

    Raises:
        UserError: a model or kernel that cannot be run.
    """
    folder, layout, run = read_request(source.read())
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")  # of libraries, about a process without a launcher
    logging.disable(logging.WARNING)

    import torch

    from megablocks_utils.rehearsal.rehearse import rehearse

    device = torch.device(run.device_type)
    meter = _Meter(device)
    rehearse(
        folder,
        layout,
        run,
        device=device,
        is_real=True,
        on_ready=meter.start,
        on_done=meter.stop,
    )
    held = {"peak_bytes": meter.peak_bytes, "allocated_bytes": meter.allocated_bytes}
    answer.write(json.dumps(held) + "\n")


class _Meter:
    """Read what tensors take: CUDA's allocator; on a CPU resident memory, less that of the start.

    What is held when the step begins (weights, Adam's states) counts; making it does not.
    """

    def __init__(self, device: Any) -> None:
        from megablocks_utils.training.report.memory import read_memory

        self._read = lambda: read_memory(device)
        self._device = device
        self._base_bytes = 0
        if device.type == "cpu":
            give_back_freed_memory({})
            self._base_bytes = self._read().allocated_bytes

    def start(self) -> None:
        """Forget the peak so far."""
        import torch

        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            reset_peak_resident()

    def stop(self) -> None:
        """Read the peak since then, and what is held now."""
        reading = self._read()
        self.peak_bytes = reading.peak_bytes - self._base_bytes
        self.allocated_bytes = reading.allocated_bytes - self._base_bytes


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
