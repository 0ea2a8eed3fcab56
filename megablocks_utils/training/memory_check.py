"""The memory plan of a run that starts, and what became of it: predicted against measured.

A plan is a help, not a condition: a run that cannot be planned starts all the same and says why.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from megablocks_utils.config import RunConfig
from megablocks_utils.errors import PlanError, UserError
from megablocks_utils.lora.settings import LoraSettings
from megablocks_utils.moe.sharded_moe import ShardedMoE
from megablocks_utils.planning.memory.run_plan import RunPlan, plan_run
from megablocks_utils.planning.model.described_shape import shape_of
from megablocks_utils.planning.model.model_description import ModelDescription
from megablocks_utils.planning.report.prediction_check import KEPT_BYTES
from megablocks_utils.processes.agreement import min_over_ranks
from megablocks_utils.processes.freed_memory import read_kept_bytes
from megablocks_utils.training.data.schedule import Schedule
from megablocks_utils.training.report.memory import read_available_memory, read_memory
from megablocks_utils.training.report.metrics import RunTotals
from megablocks_utils.training.report.parameters import count_local_bytes
from megablocks_utils.training.step.model_probe import ModelProbe

__all__ = ["MemoryCheck", "check_memory"]

_ON_CPU = "; a process on a CPU needs more: what the C library keeps of freed memory"


@dataclass(frozen=True)
class MemoryCheck:
    """What was predicted of this run, and what its process held before it held any of it.

    Attributes:
        run_plan: the prediction and its verdict; None for a run that cannot be planned.
        reason: why it cannot; empty where there is a plan.
        device_type: `cuda` or `cpu`.
        base_bytes: resident memory of this process when it was made; 0 on a GPU, where only
            tensors are measured.
        keeps_freed: whether the C library may keep what is freed, see `processes.freed_memory`.
    """

    run_plan: RunPlan | None
    reason: str
    device_type: str
    base_bytes: int
    keeps_freed: bool = False

    @property
    def imbalance(self) -> float | None:
        """Rows that the plan takes the busiest rank to receive, over its fair share."""
        return None if self.run_plan is None else self.run_plan.scenario.imbalance

    def describe(self) -> str:
        """Say the peak in one line, or why there is none."""
        if self.run_plan is None:
            return f"not planned: {self.reason}"
        return self.run_plan.describe() + (_ON_CPU if self.keeps_freed else "")

    def as_record(
        self, model: nn.Module, optimizer: Optimizer, totals: RunTotals
    ) -> dict[str, Any]:
        """Return what `run.json` holds: predicted, or why it was not, and measured.

        The components are tensor bytes of this rank; peak and allocated are those of the fullest
        rank, less `base_bytes`.

        Args:
            model: wrapped, as the last step has left it: a later forward pass leaves the output
                head gathered.
            optimizer: of the run, with its states.
            totals: the run's steps added up.
        """
        measured: dict[str, Any] = {
            "components": {
                "parameters": count_local_bytes(self._on_device(model.parameters())),
                "optimizer": count_local_bytes(self._on_device(_states(optimizer))),
            },
            "peak_bytes": max(0, totals.mem_peak_bytes - self.base_bytes),
            "allocated_bytes": max(0, totals.mem_alloc_bytes - self.base_bytes),
        }
        if self.device_type == "cpu":
            measured[KEPT_BYTES] = read_kept_bytes()
        plan = {"not_planned": self.reason} if self.run_plan is None else self.run_plan.as_record()
        return plan | {"base_bytes": self.base_bytes, "measured": measured}

    def _on_device(self, tensors: Iterable[Tensor]) -> Iterable[Tensor]:
        """Leave out what is offloaded to host memory."""
        return (tensor for tensor in tensors if tensor.device.type == self.device_type)


def check_memory(
    config: RunConfig,
    model: ModelDescription,
    schedule: Schedule,
    device: torch.device,
    sharded: ShardedMoE | None,
    *,
    probe: ModelProbe,
    lora: LoraSettings | None,
) -> MemoryCheck:
    """Predict the peak of this run, and refuse one that no device could hold.

    **Collective:** one all-reduce of one number over the world.

    Args:
        config: the run.
        model: what is trained, without adapters.
        schedule: its micro-batches.
        device: where this rank computes; its free memory is what a rank may take.
        sharded: experts and the kernel that runs them; None: transformers does.
        probe: how its attention and its loss are computed.
        lora: its adapters, new ones or those that it resumes.

    Raises:
        PlanError: on every rank, for a plan that cannot fit, unless `ignore_plan` is True.
    """
    if lora is not None:
        config = replace(config, adapter=replace(config.adapter, lora_r=lora.r))
    tokens, label_tokens, examples = schedule.largest_micro_batch()
    capacity_bytes = _least_capacity(device, schedule.world_size)
    base_bytes = 0 if device.type == "cuda" else read_memory(device).allocated_bytes
    keeps_freed = device.type == "cpu" and config.adapter.packed_format is None
    try:
        run_plan = plan_run(
            config,
            shape_of(model),
            world_size=schedule.world_size,
            device_type=device.type,
            capacity_bytes=capacity_bytes,
            tokens=tokens,
            label_tokens=label_tokens,
            examples=examples,
            packing=schedule.packing.value,
            is_varlen=probe.is_varlen,
            has_whole_logits=probe.logits_map is None,
            kernel="transformers" if sharded is None else sharded.kernel.name,
        )
    except UserError as error:
        return MemoryCheck(None, str(error), device.type, base_bytes, keeps_freed)
    if run_plan.is_impossible and not config.ignore_plan:
        raise PlanError(run_plan.describe_impossible())
    return MemoryCheck(run_plan, "", device.type, base_bytes, keeps_freed)


def _least_capacity(device: torch.device, world_size: int) -> int:
    """Return the memory that the rank with the least may take, on every rank."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = read_available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return min_over_ranks(free)


def _states(optimizer: Optimizer) -> Iterable[Tensor]:
    """Yield the moments; the count of steps is a number in memory of its own."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())
