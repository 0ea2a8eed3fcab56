"""What a run that is over leaves in `run.json`, put together from its setup and its results."""

import sys
from collections.abc import Mapping
from typing import Any

from megablocks_utils.moe.kernel_check import KernelCheck
from megablocks_utils.training.adapter_check import AdapterReport
from megablocks_utils.training.report.metrics import RunTotals
from megablocks_utils.training.report.run_record import RunRecord, build_run_record
from megablocks_utils.training.setup import Setup
from megablocks_utils.training.start_facts import describe_kernel, describe_resolved

__all__ = ["build_final_record"]


def build_final_record(
    setup: Setup,
    kernel_check: KernelCheck | None,
    adapter_report: AdapterReport | None,
    *,
    train_runtime_s: float,
    totals: RunTotals,
    plan: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
) -> RunRecord:
    """Build the record of a finished run.

    Args:
        setup: the run.
        kernel_check: what was found before the first step; None if the kernel is not ours.
        adapter_report: what checking the written adapter found; None without LoRA.
        train_runtime_s: wall time of the training loop.
        totals: the run's steps added up.
        plan: memory predicted and measured.
        evaluation: what the evaluations have come to; None without any.
    """
    kernel, reason = describe_kernel(setup)
    return build_run_record(
        sys.argv,
        setup.config,
        resolved=describe_resolved(setup),
        mesh=setup.placement.axis_sizes,
        kernel=kernel,
        kernel_reason=reason,
        kernel_probe=None if kernel_check is None else kernel_check.as_record(),
        parameters=setup.counts,
        train_runtime_s=train_runtime_s,
        totals=totals,
        device=setup.device,
        adapter_check=None if adapter_report is None else adapter_report.as_record(),
        plan=plan,
        answer_end=None if setup.answer_end is None else setup.answer_end.as_record(),
        evaluation=evaluation,
    )
