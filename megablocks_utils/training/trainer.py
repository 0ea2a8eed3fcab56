"""Hugging Face's Trainer with this project's data, loss, gradients and metrics, on FSDP1."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from megablocks_utils.fsdp.accelerate_state import assert_fsdp_is_on, turn_fsdp_on
from megablocks_utils.fsdp.fsdp1 import build_fsdp1_plugin, strip_wrappers, wrap_fsdp1
from megablocks_utils.fsdp.placement_check import verify_placements
from megablocks_utils.processes.accelerate_settings import check_layer_classes
from megablocks_utils.training.data.batches import MicroBatch, StepPlan
from megablocks_utils.training.data.schedule import Schedule
from megablocks_utils.training.report.progress import track_sharding
from megablocks_utils.training.report.trackers import tracked_values
from megablocks_utils.training.resume.run_state import RunState
from megablocks_utils.training.setup import Setup
from megablocks_utils.training.step.aux_loss import resolve_aux_loss_coef
from megablocks_utils.training.step.finish import StepFinish
from megablocks_utils.training.step.micro_batch import LossWeights, compute_micro_batch_loss
from megablocks_utils.training.step.optimizer import build_lr_scheduler, build_optimizer
from megablocks_utils.training.step_hooks import StepHooks
from megablocks_utils.training.trainer_callback import OnStep, StepCallback
from megablocks_utils.training.value_checks import (
    build_finite_check,
    restore_finite,
)

__all__ = ["MicroBatchLoader", "MoETrainer"]


class MicroBatchLoader:
    """Hand Trainer this rank's micro-batches of an epoch: every step has accumulation-many.

    Not a DataLoader, so that Accelerate does not split again what is this rank's already. The
    steps that a resumed run has done are left out, and all if it is over with them.
    """

    def __init__(
        self, schedule: Schedule, first_step: int = 0, hooks: StepHooks | None = None
    ) -> None:
        self._schedule = schedule
        self._first_step = first_step
        self._hooks = hooks or StepHooks()
        self._epoch = 0

    def __len__(self) -> int:
        accumulation = self._schedule.config.optim.gradient_accumulation_steps
        return self._schedule.steps_per_epoch * accumulation

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration goes through."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, MicroBatch | StepPlan]]:
        if self._hooks.is_over:
            return
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
        hooks: saves and stops; None does neither.

    Attributes:
        kernel_check: what comparing the kernel with eager found; None if it is not this project's.
    """

    loss_is_scaled_for_ga = True
    """Told to Trainer: a micro-batch's loss is its share of the step's already."""

    def __init__(
        self,
        setup: Setup,
        arguments: TrainingArguments,
        on_step: OnStep,
        hooks: StepHooks | None = None,
    ) -> None:
        check_layer_classes(setup.layer_classes)
        # Trainer's constructor builds the accelerator, which needs these.
        self._setup, self._hooks = setup, hooks or StepHooks()
        self._plugin = build_fsdp1_plugin(setup.precision)
        self._aux_loss_coef = resolve_aux_loss_coef(
            setup.model.config, setup.config.router_aux_loss_coef
        )
        model_config = setup.model.config
        use_cache = getattr(model_config, "use_cache", None)  # of a whole, its text config has it
        super().__init__(setup.model, arguments)
        # Which sets it to False, also in the config.json of the trained model.
        if use_cache is not None:
            model_config.use_cache = use_cache
        # Wrapped already, the model is Accelerate's to use and not to wrap.
        with track_sharding(setup.console, setup.num_layers) as on_layer:
            self._wrapped = self.model = self.model_wrapped = wrap_fsdp1(
                setup.model,
                setup.sharded,
                self._plugin,
                layer_classes=setup.layer_classes,
                device=setup.device,
                fill_local=setup.fill_local,
                on_layer=on_layer,
            )
        verify_placements(self._wrapped, setup.placement)
        # Before anything is written; weights of a checkpoint come in `train`.
        self.kernel_check = None if setup.resume else setup.verify_kernel()
        config = setup.config
        finite = build_finite_check(setup, self._wrapped)
        self._finish = StepFinish(
            self._wrapped,
            setup.sharded,
            config.optim.max_grad_norm,
            config.debug,
            finite,
            setup.routing.balance,
        )
        self._callback = StepCallback(
            setup,
            on_step,
            self._hooks,
            finish=self._finish,
            finite=finite,
            get_state=self.run_state,
        )
        self.add_callback(self._callback)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def create_accelerator_and_postprocess(self) -> None:
        """Build the accelerator, and turn FSDP on where Accelerate did not."""
        super().create_accelerator_and_postprocess()
        turn_fsdp_on(self.accelerator, self._plugin)
        assert_fsdp_is_on(self.accelerator)
        self.is_fsdp_enabled = True  # Trainer looked before it was

    def get_train_dataloader(self) -> MicroBatchLoader:  # type: ignore[override]  # see its docstring
        """Return this rank's micro-batches."""
        return MicroBatchLoader(self._setup.schedule, self._setup.first_step, self._hooks)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Build the optimizer over flat shards and experts, each kind in groups of its own."""
        if self.optimizer is None:
            named = (model or self._wrapped).named_parameters()
            self.optimizer = build_optimizer(
                ((strip_wrappers(name), parameter) for name, parameter in named),
                self._setup.config.optim,
                self._setup.precision,
                seed=self._setup.config.seed,
                plain_shard=self._setup.launch.rank,
                cpu_offload=self._setup.config.cpu_offload,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LambdaLR:
        """Build the learning rate's schedule, once."""
        if self.lr_scheduler is None:
            self.lr_scheduler = build_lr_scheduler(
                optimizer or self.create_optimizer(), self._setup.config.optim, num_training_steps
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def run_state(self) -> RunState:
        """Return what a checkpoint holds of the run, once `train` has begun."""
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        assert optimizer is not None and scheduler is not None, "train has not begun"
        return RunState(self._wrapped, getattr(optimizer, "optimizer", optimizer), scheduler)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        """Begin at the step to resume from; `MicroBatchLoader` leaves out what is done."""
        super()._init_training_state(*args)
        self.state.global_step = self._setup.first_step
        return self._setup.first_step // self._setup.schedule.steps_per_epoch, 0

    def _prepare_for_training(self, *args: Any) -> tuple[nn.Module, MicroBatchLoader]:
        """Make the optimizer, and resume from the checkpoint in this project's own way.

        Trainer's cannot restore experts, nor a run that was sharded in another way.
        """
        prepared = super()._prepare_for_training(*args)
        if self._setup.resume is not None:
            restore_finite(self._setup, self.run_state())
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
            plan.num_label_tokens,
            plan.num_real_micro_batches,
            self._aux_loss_coef,
            self._setup.probe.aux_loss,
            self._setup.probe.logits_map,
            self._setup.sequence,
        )
        loss = compute_micro_batch_loss(
            model, inputs["micro_batch"], weights, self.args.device, self._setup.routing
        )
        self._callback.add_micro_batch(plan, loss)
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
        return self._callback.loss_share * self.args.world_size

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        return super()._build_accelerator_args(**kwargs | {"fsdp_plugin": self._plugin})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step's numbers as `metrics.jsonl` has them, not Trainer's own.

        Totals of the run are in `run.json`.
        """
        if "train_runtime" in logs:
            return
        if "loss" in logs:
            logs = tracked_values(self._callback.metrics)
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self._finish_gradients()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        """Return the norm; Trainer has not called `_clip_grad_norm` if there is no clipping."""
        return self._finish_gradients() if grad_norm is None else grad_norm

    def _finish_gradients(self) -> Tensor:
        norm = self._finish.finish_gradients()
        self._callback.grad_norm = norm
        return norm
