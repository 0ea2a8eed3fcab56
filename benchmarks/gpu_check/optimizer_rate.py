"""How fast the optimizer's kernel moves its bytes, beside a copy and torch's fused AdamW.

python -m benchmarks.gpu_check.optimizer_rate cuda
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.harness.device_timing import measure_machine, time_runs
from benchmarks.harness.report import show
from benchmarks.harness.timing import spread
from megablocks_utils.kernels.adamw_step import AdamWStep
from megablocks_utils.kernels.fused.adamw import run_adamw
from megablocks_utils.processes.entry_point import run_entry_point

_PARAMETERS, _DRY_PARAMETERS = 2**28, 2**10
_OUR_BYTES, _FUSED_BYTES = 14, 28
"""Moved of a parameter: bfloat16 throughout, and float32 throughout."""


def main(argv: Sequence[str]) -> None:
    """Measure, and write the figures to standard output as JSON."""
    device = torch.device(argv[0])
    count = _PARAMETERS if device.type == "cuda" else _DRY_PARAMETERS
    copy_rate = measure_machine(device).bytes_per_s
    found: dict[str, Any] = {"parameters": count, "copy_bytes_per_s": copy_rate}
    for name, build, num_bytes in (
        ("bf16_sr kernel", _build_ours, _OUR_BYTES),
        ("torch fused AdamW, fp32", _build_fused, _FUSED_BYTES),
    ):
        times = spread(time_runs(build(count, device), device, warmups=3, repeats=10))
        rate = num_bytes * count / (times["median"] / 1e3)
        found[name] = {"ms": times, "bytes_per_s": rate, "share_of_copy": rate / copy_rate}
    show(json.dumps(found))


def _build_ours(count: int, device: torch.device) -> Callable[[], object]:
    pieces = [torch.zeros(count, dtype=torch.bfloat16, device=device) for _ in range(4)]
    weight, gradient, exp_avg, exp_avg_sq = pieces
    step = AdamWStep(lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=3)

    def run() -> None:
        run_adamw(weight, gradient, exp_avg, exp_avg_sq, step, seed=1, is_weight_stochastic=True)

    return run


def _build_fused(count: int, device: torch.device) -> Callable[[], object]:
    parameter = torch.nn.Parameter(torch.zeros(count, device=device))
    parameter.grad = torch.zeros_like(parameter)
    return torch.optim.AdamW([parameter], lr=1e-5, fused=True).step


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
