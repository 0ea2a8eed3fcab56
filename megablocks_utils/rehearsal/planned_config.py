"""The options of a run that is only planned."""

from megablocks_utils.config import (
    AdapterConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
)
from megablocks_utils.config.quantization import NO_QUANTIZATION
from megablocks_utils.planning.model.prediction import ParallelLayout, PlannedRun

__all__ = ["build_config"]


def build_config(layout: ParallelLayout, run: PlannedRun, micro_steps: int) -> RunConfig:
    """Return the options that make the training code do what is planned.

    Args:
        layout: how the experts are spread.
        run: what is planned.
        micro_steps: how many are taken.
    """
    has_ep = layout.ep_size > 1 or layout.is_dmoe
    return RunConfig(
        entry_point=run.entry_point,
        parallel=ParallelConfig(
            use_megablocks_sharding=has_ep,
            ep_size=layout.ep_size if has_ep else None,
            expert_dp=layout.expert_dp,
            dp_replicate_size=run.dp_replicate_size,
            kernel=run.kernel,
            token_dispatch=run.token_dispatch,
            sp_size=run.sp_size,
            expert_tp_size=run.expert_tp_size,
            tp_size=run.tp_size,
        ),
        adapter=AdapterConfig.of_targets(
            run.use_lora,
            lora_r=run.lora_r,
            lora_alpha=run.lora_r,
            expert_quantization=run.packed_format or NO_QUANTIZATION,
        ),
        precision=PrecisionConfig(run.precision.name, None, run.precision.optim),
        optim=OptimConfig(
            optim=run.optim,
            gradient_accumulation_steps=micro_steps,
            sync_each_batch=run.sync_each_batch,
        ),
        gradient_checkpointing=run.gradient_checkpointing,
        cpu_offload=run.cpu_offload,
        router_aux_loss_coef=0.01 if run.has_aux_loss else 0.0,
    )
