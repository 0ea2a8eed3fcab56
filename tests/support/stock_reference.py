"""The slow, obvious oracle of a whole run: one process of stock transformers and stock torch.

Nothing of this project runs here but the two functions that say which examples a step holds
(`epoch_order`) and, for the auxiliary loss alone, how they are cut into micro-batches
(`assign_examples`). One example at a time goes through the stock model, so there is no packing, no
padding, no kernel and no communication to get wrong.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from megablocks_utils.training.data.batches import assign_examples
from megablocks_utils.training.data.example_order import epoch_order
from tests.support.stock_optimizers import build_stock_optimizers
from tests.support.trace import Trace

Example = dict[str, list[int]]


@dataclass(frozen=True)
class StockRun:
    """A run of the reference; equal ones have equal results.

    Attributes:
        model_folder: checkpoint in Hugging Face format.
        data_path: JSON list of `input_ids` and `labels`.
        global_batch: examples of a step.
        num_steps: optimizer steps, also the length of the linear schedule.
        learning_rate: at the start of the schedule.
        weight_decay: of matrices; norms are not decayed.
        max_grad_norm: 0 leaves gradients as they are.
        seed: of the data order and the adapters.
        dtype: of weights, computation and Adam's states.
        lora_rank: of new adapters on the attention; 0 for none of these.
        lora_alpha: of these.
        adapter: folder of a PEFT adapter to resume from; with neither, all weights are trained.
        aux_loss_coef: weight of the load-balancing loss; 0 leaves it out.
        deal: world size, batch size and accumulation that cut a step into the micro-batches whose
            auxiliary losses are averaged; None without auxiliary loss.
        is_padded: whether these micro-batches are padded batches.
        optim: "adamw", or "muon" for the matrices between embedding and head.
    """

    model_folder: str
    data_path: str
    global_batch: int
    num_steps: int
    learning_rate: float
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    lora_rank: int = 0
    lora_alpha: int = 0
    adapter: str | None = None
    aux_loss_coef: float = 0.0
    deal: tuple[int, int, int] | None = None
    is_padded: bool = False
    optim: str = "adamw"


def train_stock(run: StockRun) -> Trace:
    """Train and record the run."""
    examples = json.loads(Path(run.data_path).read_text())
    model = _load_model(run)
    num_experts = _count_experts(model)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizers = build_stock_optimizers(
        parameters,
        partial(split_experts, num_experts=num_experts),
        uses_muon=run.optim == "muon",
        learning_rate=run.learning_rate,
        weight_decay=run.weight_decay,
    )
    schedulers = [get_linear_schedule_with_warmup(o, 0, run.num_steps) for o in optimizers]
    trace = Trace()
    for batch in islice(_global_batches(examples, run), run.num_steps):
        trace.losses.append(_accumulate(model, batch, run))
        max_norm = run.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm, foreach=False)
        trace.grad_norms.append(norm.item())
        trace.learning_rates.append(schedulers[0].get_last_lr()[0])
        if not trace.first_gradients:
            grads = ((n, p.grad.clone()) for n, p in parameters.items())
            trace.first_gradients = dict(in_our_words(n, g, num_experts) for n, g in grads)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        model.zero_grad()
    trace.stored_weights = {name: p.detach().clone() for name, p in parameters.items()}
    trace.weights = dict(
        in_our_words(name, weight, num_experts) for name, weight in trace.stored_weights.items()
    )
    return trace


def split_experts(name: str, tensor: Tensor, *, num_experts: int) -> list[Tensor]:
    """Return the matrix of each expert, as views; of what is not experts', the tensor alone.

    PEFT keeps A of the experts as (E * r, in), B as (out, r * E) with the expert running fastest.
    """
    if ".experts." not in name:
        return [tensor]
    if "lora_A" in name:
        return list(tensor.chunk(num_experts))
    if "lora_B" in name:
        return [tensor[:, e::num_experts] for e in range(num_experts)]
    return list(tensor)


def in_our_words(name: str, tensor: Tensor, num_experts: int) -> tuple[str, Tensor]:
    """Return a parameter's name without PEFT's wrappers, and adapters by expert."""
    name = name.removeprefix("base_model.model.")
    block, is_in_experts, rest = name.partition(".experts.")
    if not is_in_experts or "lora_" not in rest:
        return name, tensor
    projection = "gate_up_proj" if rest.startswith("base_layer.") else "down_proj"
    stacked = torch.stack(split_experts(name, tensor, num_experts=num_experts))
    return f"{block}.experts.{projection}_lora.lora_{'A' if 'lora_A' in rest else 'B'}", stacked


def _count_experts(model: nn.Module) -> int:
    config = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next(count for name in names if (count := getattr(config, name, None)))


def _load_model(run: StockRun) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        run.model_folder, dtype=getattr(torch, run.dtype), experts_implementation="eager"
    )
    if run.lora_rank:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=run.lora_rank,
            lora_alpha=run.lora_alpha,
            target_modules=targets,
        )
        torch.manual_seed(run.seed)
        model = get_peft_model(model, config)
    if run.adapter:
        model = PeftModel.from_pretrained(model, run.adapter, is_trainable=True)
    return model.train()


def _global_batches(examples: list[Example], run: StockRun) -> Iterator[list[Example]]:
    epoch = 0
    while True:
        order = epoch_order(len(examples), run.seed, epoch, shuffle=True)
        for start in range(0, len(order), run.global_batch):
            yield [examples[i] for i in order[start : start + run.global_batch]]
        epoch += 1


def _accumulate(model: nn.Module, batch: list[Example], run: StockRun) -> float:
    """Leave the gradient of the step in `.grad` and return the step loss."""
    num_labels = sum(label != -100 for example in batch for label in example["labels"][1:])
    loss_sum = 0.0
    for example in batch:
        tokens, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        mean = model(input_ids=tokens, labels=labels, output_router_logits=False).loss
        loss = mean * (labels[:, 1:] != -100).sum()
        (loss / num_labels).backward()
        loss_sum += loss.item()
    if run.aux_loss_coef:
        (run.aux_loss_coef * _mean_aux_loss(model, batch, run)).backward()
    return loss_sum / num_labels


def _mean_aux_loss(model: nn.Module, batch: list[Example], run: StockRun) -> Tensor:
    """Return the mean of transformers' auxiliary loss over the step's micro-batches, padded."""
    world_size, batch_size, accumulation = run.deal
    deal = assign_examples(
        [len(example["input_ids"]) for example in batch],
        world_size=world_size,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        is_padded=run.is_padded,
    )
    losses = []
    for chosen in (rank for micro_step in deal for rank in micro_step if rank):
        rows = [torch.tensor(batch[i]["input_ids"]) for i in chosen]
        tokens = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        outputs = model(input_ids=tokens, attention_mask=mask, output_router_logits=True)
        losses.append(outputs.aux_loss)
    return torch.stack(losses).mean()
