"""Find the parameters that training on text gives no gradient.

Experts of images inside the text layers and indexers that only choose positions are such. Nothing
moves them in one process of transformers, but weight decay would move those that FSDP gives
gradients of zeros. So they are frozen.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.moe.model_facts import text_config, vocab_size

__all__ = ["find_unused"]

_MIN_TOKENS, _MAX_TOKENS = 48, 4096
_BLOCKS = re.compile(r".*(compress|block|pool|rate|ratio).*")
_PLACE = re.compile(r"\.\d+(?=\.)")


def find_unused(model: nn.Module, small: PreTrainedModel, *, has_aux_loss: bool) -> tuple[str, ...]:
    """Return the parameters of a model that get no gradient, from a pass of a small one.

    The small one may have fewer layers: a parameter is of the same kind in each of them, by its
    name without their numbers. A kind that gets a gradient in any of its layers is used.

    Args:
        model: it may be on meta.
        small: a small model of its class, see `small_model`.
        has_aux_loss: whether a load-balancing loss is trained too.

    Raises:
        ConfigurationError: the small model's forward or backward pass fails.
    """
    with ForeignCode(ConfigurationError):
        has_gradient = dict(_backward(small, has_aux_loss=has_aux_loss))
    used = {_kind(name) for name, reached in has_gradient.items() if reached}
    unused = {_kind(name) for name in has_gradient} - used
    return tuple(name for name, _ in model.named_parameters() if _kind(name) in unused)


def _backward(small: PreTrainedModel, *, has_aux_loss: bool) -> Iterator[tuple[str, bool]]:
    """Yield the small model's parameters, and whether the loss depends on each."""
    trained = {name: p for name, p in small.named_parameters() if p.requires_grad}
    device = next(small.parameters()).device
    tokens = torch.arange(_count_tokens(small), device=device)[None] % vocab_size(small)
    asked: dict[str, Any] = {"output_router_logits": True} if has_aux_loss else {}
    outputs = small(input_ids=tokens, use_cache=False, **asked)
    results = list(_tensors(outputs)) if has_aux_loss else [outputs.logits]
    total = torch.stack([r.sum() for r in results if r.requires_grad]).sum()
    grads = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    yield from ((name, grad is not None) for name, grad in zip(trained, grads, strict=True))


def _count_tokens(small: PreTrainedModel) -> int:
    """Return how many tokens fill two of whatever the model makes of several: else it has none."""
    sizes = [_MIN_TOKENS]
    for name, value in text_config(small).to_dict().items():
        numbers = value.values() if isinstance(value, dict) else (value,)
        if _BLOCKS.fullmatch(name):
            sizes += [2 * n + 1 for n in numbers if type(n) is int and n < _MAX_TOKENS]
    return max(sizes)


def _tensors(outputs: object) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        yield from (tensor for value in outputs.values() for tensor in _tensors(value))
    elif isinstance(outputs, tuple | list):
        yield from (tensor for value in outputs for tensor in _tensors(value))


def _kind(name: str) -> str:
    """Return a parameter's name without the numbers of layers."""
    return _PLACE.sub(".*", name)
