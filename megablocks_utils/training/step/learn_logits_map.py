"""Learn what a model does to the logits after its output head, by showing it numbers.

The model's own forward runs, around an output head that returns known numbers and a decoder that
is not run: nothing is computed but what is between the head and the result. So the model may be on
meta.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.errors import ConfigurationError, UserError
from megablocks_utils.training.step.linear_cross_entropy import LogitsMap, takes_blocks
from megablocks_utils.training.step.replaced_forward import replaced_forward

__all__ = ["find_logits_map", "learn_logits_map"]

_NUM_ROWS = 2
_TOLERANCE = 1e-5
"""Relative: results are in fp32."""
_EXPONENTS = (-3.0, 5.0)
"""Powers of ten of what is shown: from where a cap changes nothing to where it is all there is."""


def find_logits_map(model: PreTrainedModel) -> tuple[LogitsMap | None, str]:
    """Return what is learned, or None and why the loss needs all logits at once."""
    try:
        return learn_logits_map(model), ""
    except UserError as error:
        return None, str(error)


def learn_logits_map(model: PreTrainedModel) -> LogitsMap:
    """Learn what a model does to the logits after its output head.

    Args:
        model: before anything wraps it; it may be on meta.

    Raises:
        ConfigurationError: its head is no plain linear layer, or what it does is not known here.
    """
    head = model.get_output_embeddings()
    if not takes_blocks(head):
        raise ConfigurationError(f"the output head is a {type(head).__name__}, no linear layer")
    decoder = _find_decoder(model, head)
    shown = _numbers(head.out_features)
    tokens = torch.zeros((1, _NUM_ROWS), dtype=torch.int64, device=head.weight.device)
    with (
        ForeignCode(ConfigurationError),
        torch.no_grad(),
        _replaced(decoder, head, shown) as taken,
    ):
        results = model(input_ids=tokens, use_cache=False).logits
    if taken != [(1, _NUM_ROWS, head.in_features)]:
        raise ConfigurationError(f"the output head takes hidden states of the shapes {taken}")
    if results.shape[:2] != tokens.shape or results.is_meta:
        raise ConfigurationError(f"the logits have the shape {tuple(results.shape)}")
    return _recognize(shown, results)


def _find_decoder(model: PreTrainedModel, head: nn.Linear) -> nn.Module:
    """Return what comes before the head: the largest module beside it."""
    owner = next(m for m in model.modules() if any(child is head for child in m.children()))
    beside = [child for child in owner.children() if child is not head]
    if not beside:
        raise ConfigurationError(f"a {type(owner).__name__} has nothing but its output head")
    return max(beside, key=lambda module: sum(p.numel() for p in module.parameters()))


def _numbers(vocab_size: int) -> Tensor:
    """Return (1, 2, V) numbers of both signs, in the second row the other way round."""
    sizes = torch.logspace(*_EXPONENTS, -(-vocab_size // 2), dtype=torch.float64)
    row = torch.stack((sizes, -sizes), dim=-1).flatten()[:vocab_size].float()
    return torch.stack((row, row.flip(0)))[None]


class _NoHiddenStates(BaseModelOutputWithPast):
    """Stand for what a decoder returns; whatever else is asked of it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _replaced(
    decoder: nn.Module, head: nn.Linear, shown: Tensor
) -> Iterator[list[tuple[int, ...]]]:
    """Let the decoder return nothing and the head these numbers; yields the shapes it is given."""
    taken: list[tuple[int, ...]] = []
    hidden = head.weight.new_zeros((1, _NUM_ROWS, head.in_features))

    def decode(*_args: Any, **_kwargs: Any) -> _NoHiddenStates:
        return _NoHiddenStates(last_hidden_state=hidden)

    def show(given: Tensor) -> Tensor:
        taken.append(tuple(given.shape))
        return shown.clone()

    with replaced_forward(decoder, decode), replaced_forward(head, show):
        yield taken


def _recognize(shown: Tensor, results: Tensor) -> LogitsMap:
    num_tokens = results.shape[-1]
    kept = num_tokens if num_tokens < shown.shape[-1] else None
    x, y = shown[..., :num_tokens].flatten().double(), results.flatten().double().cpu()
    largest = x.abs().argmax()
    factor = (y[largest] / x[largest]).item()
    if factor and _is_same(y, factor * x):
        return LogitsMap(_exact(factor), None, kept)
    cap = y.abs().max().item()
    bent = (y.abs() / cap).sub(0.3).abs().argmin()  # where both scale and cap can be seen
    factor = (cap * torch.atanh(y[bent] / cap) / x[bent]).item()
    if _is_same(y, cap * torch.tanh(factor * x / cap)):
        return LogitsMap(_exact(factor), cap, kept)
    raise ConfigurationError("what the model does to its logits is neither a factor nor a cap")


def _is_same(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=_TOLERANCE, atol=0.0)


def _exact(factor: float) -> float:
    """Return 1 for what is 1 but for rounding."""
    return 1.0 if abs(factor - 1.0) < _TOLERANCE / 10 else factor
