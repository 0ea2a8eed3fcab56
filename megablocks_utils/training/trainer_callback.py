"""What happens around a step of Hugging Face's Trainer: measured, checked, reported, stopped."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from megablocks_utils.training.data.batches import StepPlan
from megablocks_utils.training.report.metrics import StepMeter, StepMetrics
from megablocks_utils.training.report.utilization import mfu_per_token_rate
from megablocks_utils.training.resume.run_state import RunState
from megablocks_utils.training.setup import Setup
from megablocks_utils.training.step.finish import StepFinish
from megablocks_utils.training.step.finite import FiniteCheck
from megablocks_utils.training.step.micro_batch import MicroBatchLoss
from megablocks_utils.training.step_hooks import StepHooks

__all__ = ["OnStep", "StepCallback"]

OnStep = Callable[[StepMetrics], None]


class StepCallback(TrainerCallback):
    """Measure every step and call the run's hooks, in the order of the FSDP2 loop.

    Args:
        setup: the run.
        on_step: called with every step's metrics, on every rank.
        hooks: saves and stops.
        finish: finishes a step.
        finite: ends the run where a step leaves values that are not finite.
        get_state: returns the run's weights, optimizer and schedule.

    Attributes:
        loss_share: this rank's part of the step loss from the last micro-batch.
        grad_norm: of the whole gradient of this step, before clipping.
        metrics: of the last step.
    """

    loss_share: Tensor
    grad_norm: Tensor
    metrics: StepMetrics
    _plan: StepPlan

    def __init__(
        self,
        setup: Setup,
        on_step: OnStep,
        hooks: StepHooks,
        *,
        finish: StepFinish,
        finite: FiniteCheck,
        get_state: Callable[[], RunState],
    ) -> None:
        self._schedule = setup.schedule
        self._on_step, self._hooks = on_step, hooks
        self._finish, self._finite, self._get_state = finish, finite, get_state
        rate = mfu_per_token_rate(setup.counts, setup.device, setup.launch.world_size)
        self._meter = StepMeter(setup.device, mfu_rate=rate)
        self._loads = setup.routing.loads
        self._learning_rate = 0.0

    def add_micro_batch(self, plan: StepPlan, loss: MicroBatchLoss) -> None:
        """Take the losses of one micro-batch of the step that `plan` describes."""
        self._plan = plan
        self._meter.add_micro_batch(loss.token_loss_sum, loss.aux_loss, loss.aux_share)
        self.loss_share = loss.token_loss_sum / plan.num_label_tokens

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the run be looked at before its first step."""
        self._hooks.before_first_step(state.global_step, self._get_state())
        if self._hooks.is_over:  # then there are no micro-batches
            self._hooks.after_stop(state.global_step, self._get_state())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the step's clock."""
        self._meter.start_step()
        if self._loads is not None:
            self._loads.start_step(state.global_step + 1)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the learning rate that this step uses."""
        self._learning_rate = kwargs["lr_scheduler"].get_last_lr()[0]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reduce the step's numbers over the ranks and hand them on.

        **Collective:** every rank of the world must call.
        """
        self._finish.balance_experts()
        self._finish.check_weights(state.global_step)
        self._meter.add_nonfinite_weights(
            self._finite.count_weights(
                is_last=state.global_step == self._schedule.num_steps,
                rate=self._learning_rate * max(1.0, args.weight_decay),
            )
        )
        self.metrics = self._meter.finish_step(
            state.global_step,
            self._schedule.epoch_after(state.global_step),
            num_label_tokens=self._plan.num_label_tokens,
            num_input_tokens=self._plan.num_input_tokens,
            grad_norm=self.grad_norm,
            learning_rate=self._learning_rate,
            loads=None if self._loads is None else self._loads.finish_step(state.global_step),
        )
        self._on_step(self.metrics)
        # Before anything of the step is saved.
        self._finite.conclude(self.metrics, self._meter.num_nonfinite_weights)
        self._hooks.after_step(state.global_step, self._get_state())
        if state.global_step < self._schedule.num_steps:
            self._stop_if_asked(state, control)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop within a step if the run was asked to; what it has accumulated is dropped."""
        self._stop_if_asked(state, control)

    def _stop_if_asked(self, state: TrainerState, control: TrainerControl) -> None:
        if self._hooks.should_stop():
            self._hooks.after_stop(state.global_step, self._get_state())
            control.should_training_stop = True
