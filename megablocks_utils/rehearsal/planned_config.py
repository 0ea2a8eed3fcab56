"""The options of a run that is only planned."""

from megablocks_utils.config import (
    AdapterConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
)
from megablocks_utils.planning.model.prediction import ParallelLayout, PlannedRun

__all__ = ["MICRO_STEPS", "build_config"]

MICRO_STEPS = 2
"""Micro-steps that are rehearsed at most: one that finds no gradients, one that finds some."""


def build_config(layout: ParallelLayout, run: PlannedRun) -> RunConfig:
    """Return the options that make the training code do what is planned."""
    has_ep = layout.ep_size > 1 or layout.is_dmoe
    return RunConfig(
        entry_point=run.entry_point,
        parallel=ParallelConfig(
            use_megablocks_sharding=has_ep,
            ep_size=layout.ep_size if has_ep else None,
            expert_dp=layout.expert_dp,
            kernel=run.kernel,
        ),
        adapter=AdapterConfig(use_lora=run.use_lora, lora_r=run.lora_r, lora_alpha=run.lora_r),
        precision=PrecisionConfig(run.precision.name, None, run.precision.optim),
        optim=OptimConfig(
            gradient_accumulation_steps=min(run.accumulation, MICRO_STEPS),
            sync_each_batch=run.sync_each_batch,
        ),
        gradient_checkpointing=run.gradient_checkpointing,
        router_aux_loss_coef=0.01 if run.has_aux_loss else 0.0,
    )
