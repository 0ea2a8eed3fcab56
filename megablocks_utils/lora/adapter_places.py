"""Where a model can have adapters."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from megablocks_utils.lora.peft_format import ExpertPlace, Shape, find_expert_places

__all__ = ["Places", "find_places", "weight_of"]


@dataclass(frozen=True)
class Places:
    """Say where a model can have adapters.

    Attributes:
        linears: linear layer -> shape (out, in) of its weight.
        experts: parameter of experts -> its adapters' shapes.
        routers: router, whose weight is no linear layer's -> shape (E, in).
    """

    linears: Mapping[str, Shape]
    experts: Mapping[str, ExpertPlace]
    routers: Mapping[str, Shape]


def find_places(model: PreTrainedModel) -> Places:
    """Find the linear layers of a model, without a tied output layer, and its experts."""
    tied = model.all_tied_weights_keys
    return Places(
        {
            name: tuple(module.weight.shape)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and weight_of(name) not in tied
        },
        find_expert_places(model),
        {
            name: tuple(module.weight.shape)
            for name, module in model.named_modules()
            if not isinstance(module, nn.Linear | nn.Embedding) and _has_matrix(module)
        },
    )


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2


def weight_of(module: str) -> str:
    """Return the name of a module's weight."""
    return f"{module}.weight"
