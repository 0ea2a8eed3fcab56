"""Balance experts without a loss: correction biases move once a step, by the step's loads.

Source: DeepSeek-V3 technical report, section 2.1.2 (auxiliary-loss-free load balancing).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megablocks_utils.fsdp.materialize import FillLocal
from megablocks_utils.training.data.batches import MicroBatch
from megablocks_utils.training.step.routers import CorrectionBias, routing_of

__all__ = ["RouterBalance", "as_buffer"]


class RouterBalance:
    """Count the tokens of every expert in forward passes, and move the biases after a step.

    Args:
        biases: those that move; they must be plain tensors, the same on every rank.
        experts: the experts modules by name, as they are called.
        rate: what a bias moves by.
        device: where the counts are.
    """

    def __init__(
        self,
        biases: Sequence[CorrectionBias],
        experts: Mapping[str, nn.Module],
        rate: float,
        device: torch.device,
    ) -> None:
        self._biases, self._rate = list(biases), rate
        sizes = [bias.tensor.numel() for bias in self._biases]
        self._counts = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self._is_real: Tensor | None = None
        self._is_counting = False
        for bias, counts in zip(self._biases, self._counts.split(sizes), strict=True):
            self._watch(experts[bias.experts], counts)

    def _watch(self, experts: nn.Module, counts: Tensor) -> None:
        def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_counting:
                index, _ = routing_of(args, kwargs)
                assert index is not None, "a bias was found by what it chooses"
                chosen = index if self._is_real is None else index[self._is_real]
                counts.add_(torch.bincount(chosen.flatten(), minlength=len(counts)))

        experts.register_forward_pre_hook(count, with_kwargs=True)

    @contextmanager
    def counting(self, batch: MicroBatch) -> Iterator[None]:
        """Count what is routed while entered: real tokens, no padding and no dummies.

        A backward pass that recomputes must be outside.
        """
        mask = batch.attention_mask
        self._is_real = None if mask is None else mask.flatten().bool().to(self._counts.device)
        self._is_counting = not batch.is_dummy
        try:
            yield
        finally:
            self._is_counting = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The biases by name, as they are now."""
        return {bias.name: bias.tensor for bias in self._biases}

    @torch.no_grad()
    def update(self) -> None:
        """Move every bias towards the experts with fewer tokens than the mean; forget the counts.

        A bias moves by the rate, up or down, less the mean of these moves: its mean stays.

        **Collective:** one all-reduce of the counts over the world.
        """
        if dist.is_initialized():
            dist.all_reduce(self._counts)
        sizes = [bias.tensor.numel() for bias in self._biases]
        for bias, counts in zip(self._biases, self._counts.split(sizes), strict=True):
            # Whole numbers: the same on every rank and any number of ranks.
            signs = torch.sign(counts.sum() - counts * len(counts)).to(bias.tensor.dtype)
            moves = self._rate * (signs - signs.mean())
            bias.tensor.add_(moves.view_as(bias.tensor).to(bias.tensor.device))
        self._counts.zero_()


@torch.no_grad()
def as_buffer(bias: CorrectionBias, fill_local: FillLocal) -> None:
    """Keep a bias that is a frozen parameter as a persistent buffer: FSDP shards parameters."""
    parameter = bias.tensor
    if not isinstance(parameter, nn.Parameter):
        return
    values = parameter.detach()
    if values.is_meta:
        values = torch.empty_like(values, device="cpu")
        fill_local(bias.name, values, (0,) * values.dim())
    delattr(bias.owner, bias.attribute)
    bias.owner.register_buffer(bias.attribute, values, persistent=True)
