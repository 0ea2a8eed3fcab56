"""Count, in forward passes, which experts the tokens of a run are routed to."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megablocks_utils.mesh.token_split import TokenSplit
from megablocks_utils.training.data.batches import MicroBatch
from megablocks_utils.training.step.routers import routing_of

__all__ = ["RoutingCounts"]


class RoutingCounts:
    """Count the tokens of every expert where the experts are called, without waiting for a device.

    Args:
        experts: the experts modules by name, transformers' or ours.
        device: where the counts are.
        with_margins: whether to add up how far a token's largest weight is from its second one.

    Attributes:
        is_on: whether anything is counted.
        tokens: by name, (E + 1,) rows of each expert; the last one: of numbers that are no expert.
        margins: by name, (2,) fp64: sum of the margins, and of how many tokens.
    """

    def __init__(
        self, experts: Mapping[str, nn.Module], device: torch.device, *, with_margins: bool = False
    ) -> None:
        self.is_on = True
        self._with_margins = with_margins
        self._is_counting = False
        self._is_real: Tensor | None = None
        sizes = [module.get_parameter("down_proj").shape[0] + 1 for module in experts.values()]
        self._all_tokens = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._all_margins = torch.zeros(len(sizes), 2, dtype=torch.float64, device=device)
        self.tokens = dict(zip(experts, self._all_tokens.split(sizes), strict=True))
        self.margins = dict(zip(experts, self._all_margins, strict=True))
        for name, module in experts.items():
            self._watch(name, module)

    def _watch(self, name: str, experts: nn.Module) -> None:
        def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_counting:
                index, weights = routing_of(args, kwargs)
                split: TokenSplit | None = getattr(experts, "token_split", None)
                with torch.no_grad():
                    self._count(name, *_take(split, index, weights), self._own_real(split))

        experts.register_forward_pre_hook(count, with_kwargs=True)

    @contextmanager
    def counting(self, batch: MicroBatch) -> Iterator[None]:
        """Count what is routed while entered: real tokens, no padding and no dummies.

        A backward pass that recomputes must be outside.
        """
        mask, device = batch.attention_mask, self._all_tokens.device
        self._is_real = None if mask is None else batch.take_own(mask).flatten().bool().to(device)
        self._is_counting = self.is_on and not batch.is_dummy
        try:
            yield
        finally:
            self._is_counting = False

    def sum_over_ranks(self) -> None:
        """Sum the tokens over the ranks, in place.

        **Collective:** one all-reduce over the world.
        """
        if dist.is_initialized():
            dist.all_reduce(self._all_tokens)

    def clear(self) -> None:
        """Forget what has been counted."""
        self._all_tokens.zero_()
        self._all_margins.zero_()

    def _own_real(self, split: TokenSplit | None) -> Tensor | None:
        is_real = self._is_real
        return is_real if is_real is None or split is None else split.take(is_real)

    def _count(
        self, name: str, index: Tensor | None, weights: Tensor, is_real: Tensor | None
    ) -> None:
        tokens = self.tokens[name]
        num_experts = len(tokens) - 1
        if index is None:
            self._count_weighted(tokens, weights, is_real)
            return
        index = index.reshape(-1, index.shape[-1]).long()
        is_expert = (index >= 0) & (index < num_experts)
        _add(tokens, index.where(is_expert, num_experts), is_real)
        if self._with_margins and weights.numel() == index.numel() and index.shape[1] > 1:
            first, second = weights.reshape(index.shape).double().topk(2).values.unbind(-1)
            margin = first - second
            if is_real is not None:
                margin = margin * is_real
            self.margins[name][0] += margin.sum()
            self.margins[name][1] += len(margin) if is_real is None else is_real.sum()

    def _count_weighted(
        self, tokens: Tensor, hidden_states: Tensor, is_real: Tensor | None
    ) -> None:
        """Count the rows that are not zero: all tokens go to all experts, weighted before."""
        is_routed = hidden_states.reshape(len(tokens) - 1, -1, hidden_states.shape[-1]).any(-1)
        if is_real is not None:
            is_routed = is_routed & is_real
        tokens[:-1] += is_routed.sum(-1)


def _take(
    split: TokenSplit | None, index: Tensor | None, weights: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Return this rank's part of the tokens, where ranks hold the same ones."""
    if split is None or index is None:
        return index, weights
    own = split.own_rows(len(index))
    return index[own], weights[own]


def _add(tokens: Tensor, index: Tensor, is_real: Tensor | None) -> None:
    """Add the rows of `index` (T, K); unlike `bincount`, no host waits for the result."""
    ones = torch.ones_like(index) if is_real is None else is_real[:, None].expand_as(index).long()
    tokens.scatter_add_(0, index.flatten(), ones.flatten())
