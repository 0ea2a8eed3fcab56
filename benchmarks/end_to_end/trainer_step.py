"""transformers' own expert parallelism under its own Trainer, as its documentation has it.

Packed rows by `DataCollatorWithFlattening`; the examples in the order in which ours come, so that
every global batch is the same.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks.end_to_end.drive import Gate
from benchmarks.end_to_end.settings import LEARNING_RATE, MAX_GRAD_NORM, shard_config
from megablocks_utils.config import RunConfig, resolve_precision
from megablocks_utils.training.data.example_order import epoch_order
from megablocks_utils.training.data.schedule import Schedule


def train_with_trainer(schedule: Schedule, device: torch.device, gate: Gate) -> None:
    """Train as the schedule's options say, waiting at the gate between steps.

    **Collective:** every rank of an initialised world must call.
    """
    config = schedule.config
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        config.model.model_name_or_path,
        dtype=getattr(torch, resolve_precision(config, device.type).weights),
        distributed_config=shard_config(config, schedule.world_size),
    )
    examples = _InOrder(schedule)
    trainer = _GatedTrainer(
        model=model,
        args=_build_arguments(config, device),
        train_dataset=examples,
        data_collator=DataCollatorWithFlattening(),
    )
    trainer.sampler = SequentialSampler(examples)
    trainer.add_callback(_AtGate(gate, trainer, schedule.world_size))
    trainer.train()


class _InOrder(Dataset):
    """The examples in the order of the first epoch."""

    def __init__(self, schedule: Schedule) -> None:
        self._examples = schedule.examples
        config = schedule.config
        self._order = epoch_order(len(self._examples), config.seed, 0, config.data.shuffle)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> dict[str, list[int]]:
        input_ids, labels = self._examples[int(self._order[place])]
        return {"input_ids": input_ids.tolist(), "labels": labels.tolist()}


class _GatedTrainer(Trainer):
    """A Trainer that keeps the order of its data, and adds up the losses of a step.

    Attributes:
        sampler: gives the order.
        loss_sum: of the micro-batches since it was last taken, scaled as Trainer scales them.
    """

    sampler: Sampler
    loss_sum: torch.Tensor | float = 0.0

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        del train_dataset
        return self.sampler

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, *args, **kwargs)
        self.loss_sum = self.loss_sum + loss.detach()
        return loss


class _AtGate(TrainerCallback):
    """Waits at the gate when a step begins, and answers when it has ended."""

    def __init__(self, gate: Gate, trainer: _GatedTrainer, world_size: int) -> None:
        self._gate, self._trainer, self._world_size = gate, trainer, world_size

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._gate.wait()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # Trainer multiplies by the number of ranks, since gradients are averaged over them.
        share = float(self._trainer.loss_sum) / self._world_size
        self._trainer.loss_sum = 0.0
        self._gate.answer(share)


def _build_arguments(config: RunConfig, device: torch.device) -> TrainingArguments:
    optim = config.optim
    return TrainingArguments(
        output_dir=f"{config.output_dir}-trainer",
        per_device_train_batch_size=optim.per_device_train_batch_size,
        gradient_accumulation_steps=optim.gradient_accumulation_steps,
        max_steps=optim.max_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch_fused",
        gradient_checkpointing=config.gradient_checkpointing == "full",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
    )
