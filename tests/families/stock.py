"""One step of stock transformers in one process, an example at a time: what all must equal."""

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

__all__ = [
    "Step",
    "is_random_in_training",
    "load_peft",
    "load_stock",
    "load_whole",
    "plain_name",
    "read_examples",
    "step_stock",
]

Example = dict[str, list[int]]
# The text model's place in the model of a composite family.
_TEXT = re.compile(r"^(model\.)?language_model\.(model\.)?")


@dataclass
class Step:
    """What a step has computed: its loss, the norm of its gradient, and that of every parameter."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]


def plain_name(name: str) -> str:
    """Return a parameter's name as the text model alone has it, whatever stands around that."""
    inner = name.removeprefix("base_model.model.")
    if inner.startswith("language_model.lm_head"):
        return inner.removeprefix("language_model.")
    return _TEXT.sub("model.", inner)


def load_stock(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a folder with transformers alone: the text model, or what there is around it."""
    is_text = type(AutoConfig.from_pretrained(folder)) in AutoModelForCausalLM._model_mapping
    auto = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    model: PreTrainedModel = auto.from_pretrained(folder, dtype=dtype)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.train()


def load_whole(folder: Path) -> PreTrainedModel:
    """Load all that a folder stores: also what stands around a text model."""
    config = AutoConfig.from_pretrained(folder)
    is_composite = type(config) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if is_composite else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(folder)
    return model


def is_random_in_training(model: PreTrainedModel, examples: Sequence[Example]) -> bool:
    """Say whether a model in training draws at random: two passes differ."""
    with torch.no_grad():
        losses = [_loss_sum(model, examples[0]) for _ in range(2)]
    return not torch.equal(*losses)


def step_stock(model: nn.Module, examples: Iterable[Example]) -> Step:
    """Return the step loss and its gradients: each example alone, without padding."""
    examples = list(examples)
    num_labels = sum(label != -100 for example in examples for label in example["labels"][1:])
    total = 0.0
    for example in examples:
        loss = _loss_sum(model, example) / num_labels
        loss.backward()
        total += loss.item()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained}
    norm = torch.stack([grad.double().norm() for grad in gradients.values()]).norm().item()
    return Step(total, norm, {plain_name(name): grad for name, grad in gradients.items()})


def load_peft(folder: Path, adapter: Path) -> nn.Module:
    """Put an adapter on a stock model as PEFT does, to be trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load_stock(folder), adapter, is_trainable=True).train()


def read_examples(path: Path) -> list[Example]:
    """Return the examples of a step."""
    examples: list[Example] = json.loads(path.read_text())
    return examples


def _loss_sum(model: nn.Module, example: Example) -> Tensor:
    tokens, labels = (torch.tensor(example[key]) for key in ("input_ids", "labels"))
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits.to(wide), labels[1:], reduction="sum", ignore_index=-100)
