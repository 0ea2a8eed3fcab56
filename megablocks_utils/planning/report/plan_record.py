"""What a plan rests on, in sentences, and the plan as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megablocks_utils.planning.memory.verdict import CONTEXT_BYTES, FRAGMENTATION
from megablocks_utils.planning.model.units import format_gb
from megablocks_utils.planning.speed.layout_plan import PlanRequest, PlanRow, choose_row
from megablocks_utils.planning.speed.scale import ScalePoint, describe_dominance
from megablocks_utils.planning.speed.step_cost import (
    ACHIEVED_BANDWIDTH,
    ACHIEVED_FLOPS,
    LAUNCH_S_PER_LAYER,
    RESOLUTION,
)

__all__ = ["build_plan_record", "build_scale_record", "list_assumptions"]


def list_assumptions(request: PlanRequest, own: Mapping[str, Any]) -> list[str]:
    """Return what the figures rest on, a sentence each.

    Args:
        request: what was asked.
        own: the options of the plan itself, by name.
    """
    scenario, gpu = request.scenario, request.cluster.gpu
    config, tokens = scenario.config, scenario.rank_tokens
    says = [
        f"A micro-batch has {tokens:,} tokens a rank, {_batch_words(request)}, all of "
        "them learned; shorter examples need less.",
        f"The fullest rank of an ep group receives {scenario.imbalance} times its fair share of "
        "rows (--imbalance), and the others wait for it.",
        f"A GPU has {format_gb(request.capacity_bytes)}; beside the peak, "
        f"{FRAGMENTATION:.0%} of it are kept for fragmentation and {format_gb(CONTEXT_BYTES)} for "
        "the CUDA context and NCCL, both estimates: tight is what fits without the first.",
        "Speed is ranked only: launches of "
        f"{LAUNCH_S_PER_LAYER * 1000:.0f} ms a layer, {ACHIEVED_FLOPS:.0%} of "
        f"{gpu.peak_flops / 1e12:.0f} TFLOP/s and {ACHIEVED_BANDWIDTH:.0%} of "
        f"{gpu.intra_bytes_per_s / 1e9:.0f} GB/s within a node, {gpu.inter_bytes_per_s / 1e9:g} "
        "GB/s a GPU between nodes. Costs within "
        f"{RESOLUTION:.0%} are not told apart: there the smaller peak ranks first.",
    ]
    if own.get("gpu") is None:
        says.append(f"--gpu is not given: speed is ranked with the links of {gpu.name}.")
    if config.parallel.kernel == "auto":
        says.append(
            "--kernel auto is planned as grouped_mm: triton is taken where it was measured to be "
            "faster, and no measurements are shipped yet."
        )
    if config.cpu_offload != "none":
        says.append(
            f"With --cpu_offload {config.cpu_offload}, what lies in pinned host memory is not in "
            "these figures (--json has it, as host_bytes), nor is the time of copying it."
        )
    if request.calibration is not None:
        says.append("Seconds come from the calibration: two runs on one node, this workload.")
    if scenario.not_known:
        says.append(
            f"The formulas do not know {scenario.not_known}: one layer of each kind was "
            "rehearsed on tensors without memory, on a CPU, for every layout. Nothing was tried "
            "that would make a layout fit, and of attention only the weights count for speed."
        )
    return says


def build_plan_record(
    request: PlanRequest,
    rows: Sequence[PlanRow],
    own: Mapping[str, Any],
    assumptions: Sequence[str],
) -> dict[str, Any]:
    """Return the plan as the contract describes it."""
    chosen = choose_row(rows)
    return _head(request, own, assumptions) | {
        "rows": [row.as_record() for row in rows],
        "chosen": chosen and chosen.as_record(),
    }


def build_scale_record(
    request: PlanRequest,
    points: Sequence[ScalePoint],
    own: Mapping[str, Any],
    assumptions: Sequence[str],
) -> dict[str, Any]:
    """Return the plans for several numbers of GPUs."""
    return _head(request, own, assumptions) | {
        "worlds": [point.as_record() for point in points],
        "dominance": describe_dominance(points),
    }


def _head(
    request: PlanRequest, own: Mapping[str, Any], assumptions: Sequence[str]
) -> dict[str, Any]:
    return {
        "model": request.model,
        "options": dict(own) | {"training": asdict(request.scenario.config)},
        "capacity_bytes": request.capacity_bytes,
        "tokens_per_rank": request.scenario.rank_tokens,
        "assumptions": list(assumptions),
    }


def _batch_words(request: PlanRequest) -> str:
    config = request.scenario.config
    batch, length = config.optim.per_device_train_batch_size, config.row_tokens
    of_row = "max_seq_length" if config.data.packing_length is None else "packing_length"
    padded = request.scenario.planned_run().is_padded
    ends = ", each padded to a row of its own" if padded else ""
    return f"{batch} x {length} (--per_device_train_batch_size x --{of_row}{ends})"
