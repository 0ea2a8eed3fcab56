"""The training loop of the FSDP2 script, on Accelerate."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from megablocks_utils.fsdp.fsdp2 import shards_over_dp
from megablocks_utils.fsdp.gradients import clip_gradients, sum_replica_gradients
from megablocks_utils.shard_moe_utils import ShardedMoE
from megablocks_utils.training.batches import StepPlan
from megablocks_utils.training.debug import check_gradient_norm, check_replicas
from megablocks_utils.training.metrics import StepMeter, StepMetrics
from megablocks_utils.training.micro_batch import LossWeights, compute_micro_batch_loss
from megablocks_utils.training.schedule import Schedule


@dataclass(frozen=True)
class TrainingState:
    """Everything that a step changes or reads, wrapped and ready.

    Attributes:
        accelerator: with FSDP on.
        model: wrapped.
        optimizer: over the wrapped parameters.
        scheduler: of the learning rate, stepped once an optimizer step.
        sharded: what `shard_moe` returned; None without expert parallelism.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    sharded: ShardedMoE | None


def fit(
    state: TrainingState,
    schedule: Schedule,
    *,
    max_grad_norm: float,
    aux_loss_coef: float,
    debug: bool,
) -> Iterator[StepMetrics]:
    """Train and yield the metrics of each optimizer step.

    **Collective:** every rank of the world must iterate to the end.

    Args:
        state: what to train.
        schedule: which examples each step holds.
        max_grad_norm: global norm to clip to; 0 does not clip.
        aux_loss_coef: weight of the load-balancing loss.
        debug: check after every step that copies of an expert are equal and the norm is finite.
    """
    state.model.train()
    meter = StepMeter(state.accelerator.device)
    for step, (epoch, plan) in enumerate(schedule.plans(), start=1):
        meter.start_step()
        _accumulate_gradients(state, plan, aux_loss_coef, meter)
        if state.sharded is not None and not shards_over_dp(state.sharded):
            sum_replica_gradients(state.sharded.expert_parameters.values(), state.sharded.mesh)
        norm = clip_gradients(_trainable(state.model), max_grad_norm)
        if debug:
            check_gradient_norm(norm, step)
        learning_rate = state.scheduler.get_last_lr()[0]
        state.optimizer.step()
        state.scheduler.step()
        state.optimizer.zero_grad()
        if debug and state.sharded is not None:
            check_replicas(state.sharded, step)
        yield meter.finish_step(
            step,
            epoch,
            num_label_tokens=plan.num_label_tokens,
            num_input_tokens=plan.num_input_tokens,
            grad_norm=norm,
            learning_rate=learning_rate,
        )


def _accumulate_gradients(
    state: TrainingState, plan: StepPlan, aux_loss_coef: float, meter: StepMeter
) -> None:
    accelerator = state.accelerator
    weights = LossWeights(plan.num_label_tokens, plan.num_real_micro_batches, aux_loss_coef)
    for batch in plan.micro_batches:
        with accelerator.accumulate(state.model):
            loss = compute_micro_batch_loss(state.model, batch, weights, accelerator.device)
            # Accelerate divides by the number of micro-batches; our loss has its weight already.
            accelerator.backward(loss.objective * accelerator.gradient_accumulation_steps)
            meter.add_micro_batch(loss.token_loss_sum, loss.aux_loss)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
