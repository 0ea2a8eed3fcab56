"""The training loop of the FSDP2 script, on Accelerate."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from megablocks_utils.config.optim import MUON
from megablocks_utils.fsdp.fsdp2 import build_accelerator, prepare_fsdp2, reduce_across_groups
from megablocks_utils.fsdp.placement_check import verify_placements
from megablocks_utils.moe.kernel_check import KernelCheck
from megablocks_utils.moe.sharded_moe import ShardedMoE
from megablocks_utils.processes.accelerate_settings import check_layer_classes
from megablocks_utils.training.data.batches import MicroBatch, StepPlan
from megablocks_utils.training.report.metrics import StepMeter, StepMetrics
from megablocks_utils.training.report.progress import track_sharding
from megablocks_utils.training.report.utilization import mfu_per_token_rate
from megablocks_utils.training.resume.run_state import RunState
from megablocks_utils.training.setup import Setup
from megablocks_utils.training.step.aux_loss import resolve_aux_loss_coef
from megablocks_utils.training.step.debug import check_gradients_beside_tp
from megablocks_utils.training.step.finish import StepFinish
from megablocks_utils.training.step.finite import FiniteCheck
from megablocks_utils.training.step.micro_batch import (
    LossWeights,
    MicroBatchLoss,
    compute_micro_batch_loss,
)
from megablocks_utils.training.step.muon import find_matrices
from megablocks_utils.training.step.optimizer import build_lr_scheduler, build_optimizer
from megablocks_utils.training.step.routing_hooks import NO_ROUTING_HOOKS, RoutingHooks
from megablocks_utils.training.step_hooks import StepHooks
from megablocks_utils.training.value_checks import (
    build_finite_check,
    restore_finite,
)


@dataclass(frozen=True)
class TrainingState:
    """Everything that a step changes or reads, wrapped and ready.

    Attributes:
        accelerator: with FSDP on.
        model: wrapped.
        optimizer: over the wrapped parameters, in Accelerate's wrapper.
        scheduler: of the learning rate, stepped once an optimizer step.
        sharded: what `shard_moe` returned; None without expert parallelism.
        kernel_check: what comparing the kernel with eager found; None without `sharded`.
        routing: counts the tokens of experts, to balance them or to measure their loads.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: LRScheduler
    sharded: ShardedMoE | None
    kernel_check: KernelCheck | None = None
    routing: RoutingHooks = NO_ROUTING_HOOKS

    def run_state(self) -> RunState:
        """Return what a checkpoint holds of it."""
        return RunState(self.model, self.optimizer.optimizer, self.scheduler)


def build_training_state(setup: Setup) -> TrainingState:
    """Wrap and fill the model with FSDP2, build optimizer and schedule, resume where asked.

    With all weights there, it is checked that they lie as declared, and the kernel on them.

    **Collective:** every rank of the world must call.
    """
    config = setup.config
    check_layer_classes(setup.layer_classes)
    accelerator = build_accelerator(
        config, setup.precision, setup.layer_classes, setup.device.type, setup.placement.dense_mesh
    )
    make_optimizer = partial(
        build_optimizer,
        optim_config=config.optim,
        precision=setup.precision,
        seed=config.seed,
        cpu_offload=config.cpu_offload,
        matrices=_find_muon_matrices(setup),
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
    verify_placements(model, setup.placement)
    scheduler = build_lr_scheduler(optimizer.optimizer, config.optim, setup.schedule.num_steps)
    state = TrainingState(
        accelerator, model, optimizer, scheduler, setup.sharded, routing=setup.routing
    )
    if setup.resume is not None:
        restore_finite(setup, state.run_state())
    return replace(state, kernel_check=setup.verify_kernel())


def _find_muon_matrices(setup: Setup) -> set[str]:
    """Return what Muon trains, while the model is not wrapped; nothing with another optimizer."""
    if setup.config.optim.optim != MUON:
        return set()
    return find_matrices(setup.model, list(setup.probe.routers))


def fit(
    state: TrainingState, setup: Setup, hooks: StepHooks | None = None
) -> Iterator[StepMetrics]:
    """Train and yield the metrics of each optimizer step.

    **Collective:** every rank of the world must iterate to the end.

    Args:
        state: what to train.
        setup: the run, for its options and its schedule.
        hooks: saves and stops; None does neither.
    """
    hooks = hooks or StepHooks()
    finite = build_finite_check(setup, state.model)
    hooks.before_first_step(setup.first_step, state.run_state())
    for metrics, num_nonfinite_weights in _train(state, setup, hooks, finite):
        yield metrics
        # Before anything of the step is saved.
        finite.conclude(metrics, num_nonfinite_weights)
        hooks.after_step(metrics.step, state.run_state())


def _train(
    state: TrainingState, setup: Setup, hooks: StepHooks, finite: FiniteCheck
) -> Iterator[tuple[StepMetrics, int]]:
    """Train and yield the metrics of each step, and how many weights it left not finite."""
    state.model.train()
    optim = setup.config.optim
    aux_loss_coef = resolve_aux_loss_coef(setup.model.config, setup.config.router_aux_loss_coef)
    finish = StepFinish(
        state.model,
        state.sharded,
        optim.max_grad_norm,
        setup.config.debug,
        finite,
        state.routing.balance,
        setup.config.parallel.tp_size,
    )
    rate = mfu_per_token_rate(setup.counts, setup.device, setup.launch.world_size)
    meter = StepMeter(
        state.accelerator.device, num_copies=setup.config.parallel.tp_size, mfu_rate=rate
    )
    loads = state.routing.loads
    first_step = setup.first_step
    for step, (epoch, plan) in enumerate(setup.schedule.plans(first_step), start=first_step + 1):
        meter.start_step()
        if loads is not None:
            loads.start_step(step)
        weights = LossWeights(
            plan.num_label_tokens,
            plan.num_real_micro_batches,
            aux_loss_coef,
            setup.probe.aux_loss,
            setup.probe.logits_map,
            setup.sequence,
        )
        if not _accumulate_gradients(state, plan, weights, meter, hooks):
            hooks.after_stop(step - 1, state.run_state())
            return
        norm = finish.finish_gradients()
        if step == first_step + 1 and state.sharded is not None:
            check_gradients_beside_tp(state.model, state.sharded)
        learning_rate = finish.update(state.optimizer, state.scheduler)
        finish.balance_experts()
        finish.check_weights(step)
        meter.add_nonfinite_weights(
            finite.count_weights(
                is_last=step == setup.schedule.num_steps,
                rate=learning_rate * max(1.0, optim.weight_decay),
            )
        )
        metrics = meter.finish_step(
            step,
            epoch,
            num_label_tokens=plan.num_label_tokens,
            num_input_tokens=plan.num_input_tokens,
            grad_norm=norm,
            learning_rate=learning_rate,
            loads=None if loads is None else loads.finish_step(step),
        )
        yield metrics, meter.num_nonfinite_weights


def _accumulate_gradients(
    state: TrainingState,
    plan: StepPlan,
    weights: LossWeights,
    meter: StepMeter,
    hooks: StepHooks,
) -> bool:
    """Run the micro-batches of a step; False if the run was asked to stop on the way."""
    accelerator, number = state.accelerator, len(plan.micro_batches)
    for batch in plan.micro_batches:
        if hooks.should_stop():
            return False
        number -= 1
        reduce_across_groups(state.model, is_last=number == 0)
        with accelerator.accumulate(state.model):
            loss = run_micro_batch(state, batch, weights)
            meter.add_micro_batch(loss.token_loss_sum, loss.aux_loss, loss.aux_share)
    return True


def run_micro_batch(
    state: TrainingState, batch: MicroBatch, weights: LossWeights
) -> MicroBatchLoss:
    """Run forward and backward of one micro-batch, within `accelerator.accumulate`.

    **Collective:** every rank of the world must call, also with a dummy.
    """
    accelerator = state.accelerator
    loss = compute_micro_batch_loss(state.model, batch, weights, accelerator.device, state.routing)
    # Accelerate divides by the number of micro-batches; our loss has its weight already.
    accelerator.backward(loss.objective * accelerator.gradient_accumulation_steps)
    return loss
