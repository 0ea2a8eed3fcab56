"""The training loop of the FSDP2 script, on Accelerate."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from megablocks_utils.fsdp.fsdp2 import build_accelerator, prepare_fsdp2, shards_over_dp
from megablocks_utils.fsdp.gradients import clip_gradients, sum_replica_gradients
from megablocks_utils.moe.kernel_check import KernelCheck
from megablocks_utils.moe.sharded_moe import ShardedMoE
from megablocks_utils.training.data.batches import MicroBatch, StepPlan
from megablocks_utils.training.report.metrics import StepMeter, StepMetrics
from megablocks_utils.training.report.progress import track_sharding
from megablocks_utils.training.resume.resume_point import restore_run
from megablocks_utils.training.resume.run_state import RunState
from megablocks_utils.training.setup import Setup
from megablocks_utils.training.step.debug import check_gradient_norm, check_replicas
from megablocks_utils.training.step.micro_batch import (
    LossWeights,
    MicroBatchLoss,
    compute_micro_batch_loss,
    resolve_aux_loss_coef,
)
from megablocks_utils.training.step.optimizer import build_lr_scheduler, build_optimizer
from megablocks_utils.training.step_hooks import StepHooks


@dataclass(frozen=True)
class TrainingState:
    """Everything that a step changes or reads, wrapped and ready.

    Attributes:
        accelerator: with FSDP on.
        model: wrapped.
        optimizer: over the wrapped parameters.
        scheduler: of the learning rate, stepped once an optimizer step.
        sharded: what `shard_moe` returned; None without expert parallelism.
        kernel_check: what comparing the kernel with eager found; None without `sharded`.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    sharded: ShardedMoE | None
    kernel_check: KernelCheck | None = None

    def run_state(self) -> RunState:
        """Return what a checkpoint holds of it."""
        return RunState(self.model, self.optimizer.optimizer, self.scheduler)


def build_training_state(setup: Setup) -> TrainingState:
    """Wrap and fill the model with FSDP2, build optimizer and schedule, go on where asked.

    With all weights there, the kernel is checked on them.

    **Collective:** every rank of the world must call.
    """
    config = setup.config
    accelerator = build_accelerator(config, setup.precision, setup.layer_classes, setup.device.type)
    if config.report_to:
        accelerator.init_trackers("megablocks_utils")
    make_optimizer = partial(
        build_optimizer,
        optim_config=config.optim,
        precision=setup.precision,
        seed=config.seed,
    )
    with track_sharding(setup.console, setup.num_layers) as on_layer:
        model, optimizer = prepare_fsdp2(
            accelerator,
            setup.model,
            setup.sharded,
            make_optimizer,
            fill_local=setup.fill_local,
            on_layer=on_layer,
        )
    scheduler = build_lr_scheduler(optimizer.optimizer, config.optim, setup.schedule.num_steps)
    state = TrainingState(accelerator, model, optimizer, scheduler, setup.sharded)
    if setup.resume is not None:
        restore_run(setup.resume, state.run_state(), setup.launch)
    return replace(state, kernel_check=setup.verify_kernel())


def fit(
    state: TrainingState, setup: Setup, hooks: StepHooks | None = None
) -> Iterator[StepMetrics]:
    """Train and yield the metrics of each optimizer step.

    **Collective:** every rank of the world must iterate to the end.

    With `--debug`, every step checks that the norm is finite and that copies of experts are equal.

    Args:
        state: what to train.
        setup: the run, for its options and its schedule.
        hooks: saves and stops; None does neither.
    """
    hooks = hooks or StepHooks()
    state.model.train()
    config = setup.config
    aux_loss_coef = resolve_aux_loss_coef(setup.model.config, config.router_aux_loss_coef)
    meter = StepMeter(state.accelerator.device)
    first_step = setup.first_step
    for step, (epoch, plan) in enumerate(setup.schedule.plans(first_step), start=first_step + 1):
        meter.start_step()
        if not _accumulate_gradients(state, plan, aux_loss_coef, meter, hooks):
            hooks.after_stop(step - 1)
            return
        norm = finish_gradients(state, config.optim.max_grad_norm)
        if config.debug:
            check_gradient_norm(norm, step)
        learning_rate = state.scheduler.get_last_lr()[0]
        state.optimizer.step()
        state.scheduler.step()
        state.optimizer.zero_grad()
        if config.debug and state.sharded is not None:
            check_replicas(state.sharded, step)
        yield meter.finish_step(
            step,
            epoch,
            num_label_tokens=plan.num_label_tokens,
            num_input_tokens=plan.num_input_tokens,
            grad_norm=norm,
            learning_rate=learning_rate,
        )
        hooks.after_step(step)


def _accumulate_gradients(
    state: TrainingState,
    plan: StepPlan,
    aux_loss_coef: float,
    meter: StepMeter,
    hooks: StepHooks,
) -> bool:
    """Run the micro-batches of a step; False if the run was asked to stop on the way."""
    accelerator = state.accelerator
    weights = LossWeights(plan.num_label_tokens, plan.num_real_micro_batches, aux_loss_coef)
    for batch in plan.micro_batches:
        if hooks.should_stop():
            return False
        with accelerator.accumulate(state.model):
            loss = run_micro_batch(state, batch, weights)
            meter.add_micro_batch(loss.token_loss_sum, loss.aux_loss)
    return True


def run_micro_batch(
    state: TrainingState, batch: MicroBatch, weights: LossWeights
) -> MicroBatchLoss:
    """Run forward and backward of one micro-batch, within `accelerator.accumulate`.

    **Collective:** every rank of the world must call, also with a dummy.
    """
    accelerator = state.accelerator
    loss = compute_micro_batch_loss(state.model, batch, weights, accelerator.device)
    # Accelerate divides by the number of micro-batches; our loss has its weight already.
    accelerator.backward(loss.objective * accelerator.gradient_accumulation_steps)
    return loss


def finish_gradients(state: TrainingState, max_grad_norm: float) -> Tensor:
    """Sum the gradients of the experts' copies, clip all, and return the norm before clipping.

    **Collective:** every rank of the world must call.
    """
    if state.sharded is not None and not shards_over_dp(state.sharded):
        sum_replica_gradients(state.sharded.expert_parameters.values(), state.sharded.mesh)
    trainable = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    return clip_gradients(trainable, max_grad_norm)
