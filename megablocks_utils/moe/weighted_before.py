"""Blocks that weight the tokens before the experts: each token goes to its own experts only.

Such a block hands all tokens to all experts, weighted with zero where the router chose another:
E times the work, and every rank's tokens on every rank.
"""

from types import MethodType
from typing import Protocol, cast

import torch
from torch import Tensor, nn

__all__ = ["route_before_experts"]


class _Block(Protocol):
    """What such a block has; its router gives scores (T, E), zero if not chosen, and logits."""

    hidden_dim: int
    top_k: int
    router: nn.Module
    experts: nn.Module
    shared_expert: nn.Module


def route_before_experts(block: nn.Module) -> None:
    """Let a block call its experts with the tokens of each alone, as others call theirs."""
    block.forward = MethodType(_forward, block)


def _forward(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    block = cast("_Block", self)
    hidden_states = hidden_states.reshape(-1, block.hidden_dim)
    scores, router_logits = block.router(hidden_states)
    index = router_logits.topk(block.top_k, dim=1).indices
    weighted = hidden_states.unsqueeze(1) * scores.gather(1, index).unsqueeze(2)  # (T, K, H)
    # One slot a row, with weight one: the rows are weighted already.
    slots = index.reshape(-1, 1)
    ones = torch.ones_like(slots, dtype=weighted.dtype)
    results = block.experts(weighted.flatten(0, 1), slots, ones)
    return block.shared_expert(hidden_states) + results.view_as(weighted).sum(1), router_logits
