"""Time on a device: events around each run, a cold L2 cache before it; and what the device can do.

On a CPU the same functions use the clock and flush nothing: for trying out the benchmark itself.
"""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.harness.timing import wait_for

WARMUPS, REPEATS, LEAST_REPEATS = 10, 50, 10
LEAST_FLUSH_BYTES = 64 * 2**20
_PEAK_SIZE, _PEAK_BYTES = 8192, 2 * 2**30
_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"


@dataclass(frozen=True)
class Machine:
    """Rates of dense matrix products and copies, as measured, not as advertised."""

    flops_per_s: float
    bytes_per_s: float


def time_runs(
    run: Callable[[], object],
    device: torch.device,
    *,
    repeats: int = REPEATS,
    warmups: int = WARMUPS,
    most_s: float = 5.0,
) -> list[float]:
    """Return the milliseconds of each run.

    Args:
        run: what to time; the host may run ahead of the device, as it does in training.
        device: where it runs.
        repeats: how often; fewer, but not fewer than `LEAST_REPEATS`, if that would take long.
        warmups: runs before, in which kernels are compiled and memory is taken.
        most_s: how long it may take, by the last warm-up.
    """
    for _ in range(warmups - 1):
        run()
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    seconds = time.perf_counter() - start
    repeats = min(repeats, max(LEAST_REPEATS, int(most_s / max(seconds, 1e-9))))
    if device.type == "cuda":
        return _time_by_events(run, device, repeats)
    return [_time_by_clock(run) for _ in range(repeats)]


def describe_timing(device: torch.device) -> str:
    """Say how a time is taken."""
    if device.type != "cuda":
        return "milliseconds by the host's clock; no cache is flushed"
    flush = _flush_bytes(device) // 2**20
    return (
        f"milliseconds between two CUDA events, after {WARMUPS} warm-ups; before each run "
        f"{flush} MiB are written to empty the L2 cache; n runs ({REPEATS}, fewer where they "
        "would take over 5 seconds, never under 10): median, least, largest"
    )


def measure_machine(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Machine:
    """Return the median rates of a large matrix product and a large copy, timed as contenders are.

    A copy reads and writes every byte, so it moves twice its size.
    """
    size = _PEAK_SIZE if device.type == "cuda" else 256
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product_ms = time_runs(lambda: one @ other, device)
    num_bytes = _PEAK_BYTES if device.type == "cuda" else 2**20
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = time_runs(lambda: target.copy_(source), device)
    return Machine(
        flops_per_s=2 * size**3 / (median(product_ms) / 1e3),
        bytes_per_s=2 * source.numel() / (median(copy_ms) / 1e3),
    )


def read_clocks(device: torch.device) -> dict[str, str] | None:
    """Return clocks, power and temperature as `nvidia-smi` prints them; None without it."""
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = answer.stdout.strip().split(", ")
    return dict(zip(_CLOCKS.split(","), values, strict=False))


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return the name, memory, processors and L2 cache of the device."""
    if device.type != "cuda":
        return {"name": "cpu"}
    seen = torch.cuda.get_device_properties(device)
    return {
        "name": seen.name,
        "memory_bytes": seen.total_memory,
        "processors": seen.multi_processor_count,
        "l2_bytes": seen.L2_cache_size,
        "capability": f"{seen.major}.{seen.minor}",
    }


def _time_by_events(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    flush = torch.empty(_flush_bytes(device), dtype=torch.uint8, device=device)
    pairs = [(_event(), _event()) for _ in range(repeats)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        run()
        end.record()
    wait_for(device)
    return [start.elapsed_time(end) for start, end in pairs]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _time_by_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _flush_bytes(device: torch.device) -> int:
    return max(LEAST_FLUSH_BYTES, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
