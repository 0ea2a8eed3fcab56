"""What our FSDP2 step is compared with: transformers' own expert parallelism, and PEFT.

All systems load the same checkpoint, see the same global batches in the same order, and take the
same step: the token mean of the global batch as loss, its gradient clipped to norm 1, fused AdamW
with a constant learning rate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.end_to_end.drive import Gate
from benchmarks.end_to_end.settings import LEARNING_RATE, MAX_GRAD_NORM, shard_config
from benchmarks.end_to_end.trainer_step import train_with_trainer
from megablocks_utils.config import RunConfig, parse_args, resolve_precision
from megablocks_utils.lora.apply import apply_lora, choose_adapters
from megablocks_utils.lora.settings import build_peft_config
from megablocks_utils.processes.launch import check_environment
from megablocks_utils.processes.start import start_processes
from megablocks_utils.training.data.batches import MicroBatch
from megablocks_utils.training.data.example_order import epoch_order
from megablocks_utils.training.data.examples import load_examples
from megablocks_utils.training.data.schedule import Schedule
from megablocks_utils.training.data.text import IGNORED_LABEL
from megablocks_utils.training.step.forward import run_forward
from megablocks_utils.training.step.gradient_checkpointing import apply_gradient_checkpointing
from megablocks_utils.training.step.objective import token_loss_sum

PACKED, PADDED, TRAINER, PEFT = "packed", "padded", "trainer", "peft"
KINDS = (PACKED, PADDED, TRAINER, PEFT)


def train_other(kind: str, argv: Sequence[str], gate: Gate) -> None:
    """Train as options of our script say, but with transformers, waiting between steps.

    **Collective:** a process of each rank, with the launcher's environment.

    Args:
        kind: `packed` and `padded` are `StockStep`, `trainer` is transformers' Trainer, `peft` PEFT
            over the whole model on every rank.
        argv: of our script.
        gate: where to wait.
    """
    config = parse_args(argv, entry_point="fsdp2")
    launch = check_environment(config)
    device = start_processes(launch)
    examples = load_examples(config.data, None, launch)
    schedule = Schedule(config, examples, launch.rank, launch.world_size)
    if kind == TRAINER:
        train_with_trainer(schedule, device, gate)
        return
    stock = StockStep(schedule, device, padded=kind == PADDED, is_sharded=kind != PEFT)
    while True:
        gate.wait()
        gate.answer(stock.step() / launch.world_size)


class StockStep:
    """transformers' expert parallelism in a plain loop.

    Args:
        schedule: which examples a step holds, and the run's options: model, ep_size, adapters,
            checkpointing, precision. LoRA on experts is PEFT's own, which fails in the first step.
        device: where this rank computes.
        padded: as most scripts do, examples in file order, padded to the longest of their
            micro-batch, an attention mask, the model's own loss over all positions. False: as
            lean as the stock model allows: our packed rows, and logits of label positions only.
        is_sharded: whether transformers shards the model; else every rank holds it whole, and the
            gradients of its adapters are averaged over the ranks.

    Attributes:
        num_positions: tokens that this rank computed so far, padding included.
        grad_norm: of the last step, before clipping.
    """

    def __init__(
        self,
        schedule: Schedule,
        device: torch.device,
        *,
        padded: bool,
        is_sharded: bool = True,
    ) -> None:
        config = schedule.config
        self._schedule, self._device = schedule, device
        self._is_lora = config.adapter.has_lora
        self.num_positions = 0
        self.grad_norm = 0.0
        dtype = getattr(torch, resolve_precision(config, device.type).weights)
        model = AutoModelForCausalLM.from_pretrained(
            config.model.model_name_or_path,
            dtype=dtype,
            distributed_config=shard_config(config, schedule.world_size) if is_sharded else None,
        )
        if not is_sharded:
            nn.Module.to(model, device)
        if self._is_lora:
            _attach_adapters(model, config, dtype)
        apply_gradient_checkpointing(model, config.gradient_checkpointing)
        model.train()
        self._by_mesh = _group_by_mesh(model)
        groups = [{"params": parameters} for parameters in self._by_mesh]
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        build_batches = _padded_batches if padded else _packed_batches
        self._batches = build_batches(model, device, schedule)

    def step(self) -> float:
        """Train one optimizer step and return its loss."""
        num_label_tokens, micro_batches = next(self._batches)
        self.num_positions += sum(batch.num_positions for batch in micro_batches)
        total = torch.zeros((), device=self._device)
        for batch in micro_batches:
            # FSDP2 averages over ranks: the share of a rank counts world_size times.
            loss = batch.loss(num_label_tokens / self._schedule.world_size)
            loss.backward()
            total += loss.detach() / self._schedule.world_size
        if self._is_lora:
            _average_gradients(self._by_mesh)
        norm = _clip(self._by_mesh)
        self._optimizer.step()
        self._optimizer.zero_grad()
        dist.all_reduce(total)
        self.grad_norm = norm.item()
        return total.item()


@dataclass(frozen=True)
class StockBatch:
    """A micro-batch of one rank.

    Attributes:
        num_positions: tokens that are computed, padding included.
        loss: number of items that the sum of token losses is divided by -> loss.
    """

    num_positions: int
    loss: Callable[[float], Tensor]


Batches = Iterator[tuple[int, list[StockBatch]]]
"""Of each global batch its label tokens, and this rank's micro-batches."""


def _packed_batches(model: nn.Module, device: torch.device, schedule: Schedule) -> Batches:
    for _, plan in schedule.plans():
        batches = [
            StockBatch(batch.input_ids.numel(), partial(_packed_loss, model, device, batch))
            for batch in plan.micro_batches
        ]
        yield plan.num_label_tokens, batches


def _padded_batches(model: nn.Module, device: torch.device, schedule: Schedule) -> Batches:
    """Assign the examples of a global batch in order, a micro-batch to each rank in turn."""
    config = schedule.config
    size = config.optim.per_device_train_batch_size
    stride = size * schedule.world_size
    batch = stride * config.optim.gradient_accumulation_steps
    order = epoch_order(len(schedule.examples), config.seed, 0, config.data.shuffle)
    for start in range(0, len(order) - batch + 1, batch):
        chosen = order[start : start + batch]
        own = range(schedule.rank * size, batch, stride)
        padded = [_pad(schedule, chosen[first : first + size]) for first in own]
        batches = [
            StockBatch(one["input_ids"].numel(), partial(_padded_loss, model, device, one))
            for one in padded
        ]
        yield int(schedule.examples.num_label_tokens[chosen].sum()), batches


def _pad(schedule: Schedule, chosen: list[int]) -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask` and `labels`, each (B, T)."""
    pairs = [schedule.examples[i] for i in chosen]
    input_ids, labels = (
        [torch.from_numpy(part).long() for part in parts] for parts in zip(*pairs, strict=True)
    )
    mask = [torch.ones_like(ids) for ids in input_ids]
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True),
        "attention_mask": pad_sequence(mask, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }


def _packed_loss(
    model: nn.Module, device: torch.device, batch: MicroBatch, num_items: float
) -> Tensor:
    _, logits, targets = run_forward(model, batch, device)
    return token_loss_sum(logits, targets) / num_items


def _padded_loss(
    model: nn.Module, device: torch.device, inputs: Mapping[str, Tensor], num_items: float
) -> Tensor:
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    return model(**inputs, num_items_in_batch=num_items, use_cache=False).loss


def _attach_adapters(model: PreTrainedModel, config: RunConfig, dtype: torch.dtype) -> None:
    adapters = choose_adapters(model, config.adapter)
    if not config.adapter.trains_experts:
        apply_lora(model, None, adapters, dtype=dtype, seed=config.seed)
        return
    model.requires_grad_(False)
    inject_adapter_in_model(build_peft_config(adapters.settings, model), model)


def _group_by_mesh(model: nn.Module) -> list[list[nn.Parameter]]:
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault(mesh, []).append(parameter)
    return list(groups.values())


def _average_gradients(groups: list[list[nn.Parameter]]) -> None:
    """Average the gradients of adapters, which stock FSDP does not manage, in one all-reduce."""
    grads = [grad for group in groups for grad in _gradients(group)]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])


def _clip(groups: list[list[nn.Parameter]]) -> Tensor:
    """Clip over all meshes; `torch.nn.utils.clip_grad_norm_` cannot, Trainer does so."""
    norms = [get_total_norm(_gradients(group)) for group in groups]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        clip_grads_with_norm_(group, MAX_GRAD_NORM, total)
    return total


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
