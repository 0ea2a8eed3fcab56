"""Hugging Face's Trainer with this project's data, loss, gradients and metrics, on FSDP1."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from megablocks_utils.fsdp.accelerate_state import assert_fsdp_is_on, turn_fsdp_on
from megablocks_utils.fsdp.fsdp1 import build_fsdp1_plugin, strip_wrappers, wrap_fsdp1
from megablocks_utils.fsdp.gradients import clip_gradients, sum_replica_gradients
from megablocks_utils.training.data.batches import MicroBatch, StepPlan
from megablocks_utils.training.data.schedule import Schedule
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

__all__ = ["MicroBatchLoader", "MoETrainer"]

OnStep = Callable[[StepMetrics], None]


class MicroBatchLoader:
    """Hand Trainer this rank's micro-batches of an epoch: every step has accumulation-many.

    Not a DataLoader, so that Accelerate does not split once more what is this rank's already. The
    steps that a resumed run has done are left out.
    """

    def __init__(self, schedule: Schedule, first_step: int = 0) -> None:
        self._schedule = schedule
        self._first_step = first_step
        self._epoch = 0

    def __len__(self) -> int:
        accumulation = self._schedule.config.optim.gradient_accumulation_steps
        return self._schedule.steps_per_epoch * accumulation

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration goes through."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, MicroBatch | StepPlan]]:
        for plan in self._schedule.plans_of_epoch(self._epoch, self._first_step):
            for micro_batch in plan.micro_batches:
                yield {"micro_batch": micro_batch, "plan": plan}


class MoETrainer(Trainer):
    """Train with the contract's meaning of a step.

    Trainer keeps its loop, callbacks, logging and Accelerate; everything a number depends on is
    what the FSDP2 loop uses too.

    Args:
        setup: the run, its model not wrapped yet.
        arguments: from `build_trainer_arguments`.
        on_step: called with every step's metrics, on every rank.

    Attributes:
        hooks: saves and stops; to be set before `train`.
        kernel_check: what comparing the kernel with eager found; None if it is not this project's.
    """

    hooks: StepHooks

    loss_is_scaled_for_ga = True
    """Told to Trainer: a micro-batch's loss is its share of the step's already."""

    def __init__(self, setup: Setup, arguments: TrainingArguments, on_step: OnStep) -> None:
        # Trainer's constructor builds the accelerator, which needs these.
        self._setup = setup
        self._plugin = build_fsdp1_plugin(setup.precision)
        self._aux_loss_coef = resolve_aux_loss_coef(
            setup.model.config, setup.config.router_aux_loss_coef
        )
        self.hooks = StepHooks()
        self._report = _StepReport(setup, on_step, self)
        super().__init__(setup.model, arguments, callbacks=[self._report])
        # Wrapped already, the model is Accelerate's to use and not to wrap.
        with track_sharding(setup.console, setup.num_layers) as on_layer:
            self.model = self.model_wrapped = wrap_fsdp1(
                setup.model,
                setup.sharded,
                self._plugin,
                layer_classes=setup.layer_classes,
                device=setup.device,
                fill_local=setup.fill_local,
                on_layer=on_layer,
            )
        # Before anything is written; weights of a checkpoint come in `train`.
        self.kernel_check = None if setup.resume else setup.verify_kernel()
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def create_accelerator_and_postprocess(self) -> None:
        """Build the accelerator, and turn FSDP on where Accelerate did not."""
        super().create_accelerator_and_postprocess()
        turn_fsdp_on(self.accelerator, self._plugin)
        assert_fsdp_is_on(self.accelerator)
        self.is_fsdp_enabled = True  # Trainer looked before it was

    def get_train_dataloader(self) -> MicroBatchLoader:
        """Return this rank's micro-batches."""
        return MicroBatchLoader(self._setup.schedule, self._setup.first_step)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Build the optimizer over flat shards and experts, each kind in groups of its own."""
        if self.optimizer is None:
            named = (model or self.model).named_parameters()
            self.optimizer = build_optimizer(
                ((strip_wrappers(name), parameter) for name, parameter in named),
                self._setup.config.optim,
                self._setup.precision,
                seed=self._setup.config.seed,
                plain_shard=self._setup.launch.rank,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """Build the learning rate's schedule, once."""
        if self.lr_scheduler is None:
            self.lr_scheduler = build_lr_scheduler(
                optimizer or self.optimizer, self._setup.config.optim, num_training_steps
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def run_state(self) -> RunState:
        """Return what a checkpoint holds of the run."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return RunState(self.model, optimizer, self.lr_scheduler)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        """Begin at the step to go on from; `MicroBatchLoader` leaves out what is done."""
        super()._init_training_state(*args)
        self.state.global_step = self._setup.first_step
        return self._setup.first_step // self._setup.schedule.steps_per_epoch, 0

    def _prepare_for_training(self, *args: Any) -> tuple[nn.Module, MicroBatchLoader]:
        """Make the optimizer, and go on from the checkpoint in this project's own way.

        Trainer's cannot put back experts, nor a run that was sharded in another way.
        """
        prepared = super()._prepare_for_training(*args)
        if self._setup.resume is not None:
            restore_run(self._setup.resume, self.run_state(), self._setup.launch)
            self.kernel_check = self._setup.verify_kernel()
        return prepared

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return what is differentiated: this micro-batch's share of the step loss."""
        plan: StepPlan = inputs["plan"]
        weights = LossWeights(
            plan.num_label_tokens, plan.num_real_micro_batches, self._aux_loss_coef
        )
        loss = compute_micro_batch_loss(model, inputs["micro_batch"], weights, self.args.device)
        self._report.add_micro_batch(plan, loss)
        return loss.objective

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run forward and backward of one micro-batch.

        Returns:
            What Trainer logs: it adds the micro-steps and takes the mean over ranks, so the share
            of the step loss (without the auxiliary loss) times the ranks.
        """
        super().training_step(model, inputs, num_items_in_batch)
        return self._report.loss_share * self.args.world_size

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        return super()._build_accelerator_args(**kwargs | {"fsdp_plugin": self._plugin})

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self._finish_gradients(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        """Return the norm; Trainer has not called `_clip_grad_norm` if there is no clipping."""
        return self._finish_gradients(model, 0.0) if grad_norm is None else grad_norm

    def _finish_gradients(self, model: nn.Module, max_norm: float) -> Tensor:
        """Sum the gradients of the experts' copies, clip all, and keep the norm for the report."""
        sharded = self._setup.sharded
        if sharded is not None:
            sum_replica_gradients(sharded.expert_parameters.values(), sharded.mesh)
        norm = clip_gradients(model.parameters(), max_norm)
        self._report.grad_norm = norm
        return norm


class _StepReport(TrainerCallback):
    """Measure every step, and check it in a `--debug` run.

    Attributes:
        loss_share: this rank's part of the step loss from the last micro-batch.
        grad_norm: of the whole gradient of this step, before clipping.
    """

    loss_share: Tensor
    grad_norm: Tensor

    def __init__(self, setup: Setup, on_step: OnStep, trainer: "MoETrainer") -> None:
        self._trainer = trainer
        self._schedule = setup.schedule
        self._sharded = setup.sharded
        self._is_debug_run = setup.config.debug
        self._on_step = on_step
        self._meter = StepMeter(setup.device)
        self._plan: StepPlan | None = None
        self._learning_rate = 0.0

    def add_micro_batch(self, plan: StepPlan, loss: MicroBatchLoss) -> None:
        """Take the losses of one micro-batch of the step that `plan` describes."""
        self._plan = plan
        self._meter.add_micro_batch(loss.token_loss_sum, loss.aux_loss)
        self.loss_share = loss.token_loss_sum / plan.num_label_tokens

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the step's clock."""
        self._meter.start_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the learning rate that this step uses."""
        self._learning_rate = kwargs["lr_scheduler"].get_last_lr()[0]
        if self._is_debug_run:
            check_gradient_norm(self.grad_norm, state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reduce the step's numbers over the ranks and hand them on.

        **Collective:** every rank of the world must call.
        """
        if self._is_debug_run and self._sharded is not None:
            check_replicas(self._sharded, state.global_step)
        metrics = self._meter.finish_step(
            state.global_step,
            state.global_step / self._schedule.steps_per_epoch,
            num_label_tokens=self._plan.num_label_tokens,
            num_input_tokens=self._plan.num_input_tokens,
            grad_norm=self.grad_norm,
            learning_rate=self._learning_rate,
        )
        self._on_step(metrics)
        self._trainer.hooks.after_step(state.global_step)
        if state.global_step < self._schedule.num_steps:
            self._stop_if_asked(state, control)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop within a step if the run was asked to; what it has accumulated is dropped."""
        self._stop_if_asked(state, control)

    def _stop_if_asked(self, state: TrainerState, control: TrainerControl) -> None:
        if self._trainer.hooks.should_stop():
            self._trainer.hooks.after_stop(state.global_step)
            control.should_training_stop = True
