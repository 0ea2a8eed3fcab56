"""Find the parts of a model that torch cannot compile, on a small model of its class.

Python code that torch.compile cannot follow, or that loops over tokens, is found in seconds there.
Graphs are made and no code of them: that may still fail on a rank, and then its part is eager.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from megablocks_utils.attention.implementation import set_implementation
from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.moe.model_facts import vocab_size
from megablocks_utils.training.step.compiled_parts import PartCode, compile_parts, find_parts

__all__ = ["find_eager_parts"]

_FIRST_LENGTHS, _OTHER_LENGTHS = (37, 24), (75, 141)
"""Tokens of a row; the other lengths need more blocks and chunks, and must need no new code."""
_LIMIT_S = 120.0
_NEW_LENGTHS = "it would be compiled for each number of tokens"


def find_eager_parts(
    small: PreTrainedModel, *, attention: str, has_router_logits: bool
) -> dict[str, str]:
    """Return the classes of parts that cannot be compiled, with reasons.

    Args:
        small: a small model of the class, see `small_model`.
        attention: implementation that the run uses.
        has_router_logits: whether the run asks the model for its router logits.

    Raises:
        ConfigurationError: the small model cannot be run, or not in time.
    """

    def refusal(reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"compile is True, but it must be False for a model of type {small.config.model_type}: "
            f"{reason}.",
            parameters=("compile",),
        )

    asked = {"output_router_logits": True} if has_router_logits else {}
    with ForeignCode(refusal, limit_s=_LIMIT_S), torch.random.fork_rng(devices=[]):
        set_implementation(small, attention)
        with _compiled_while_training(small) as codes:
            _run(small, _FIRST_LENGTHS, asked)
            counts = [code.num_graphs for code in codes]
            _run(small, _OTHER_LENGTHS, asked)
    for code, count in zip(codes, counts, strict=True):
        if not code.reason and code.num_graphs > count:
            code.reason = _NEW_LENGTHS
    return {code.kind.__name__: code.reason for code in codes if code.reason}


@contextmanager
def _compiled_while_training(small: PreTrainedModel) -> Iterator[list[PartCode]]:
    """Compile the parts to graphs that run eager, while entered; then all is as before."""
    was_training, parts = small.training, find_parts(small)
    small.train()
    try:
        yield compile_parts(small, backend="eager", report=lambda _: None)
    finally:
        for part in parts.values():
            vars(part).pop("forward", None)
        small.train(was_training)
        torch._dynamo.reset()


def _run(small: PreTrainedModel, lengths: Sequence[int], asked: dict[str, Any]) -> None:
    device = next(small.parameters()).device
    for length in lengths:
        tokens = torch.arange(length, device=device)[None] % vocab_size(small)
        small(input_ids=tokens, use_cache=False, **asked)
