"""Balance experts without a loss: correction biases move once a step, by the step's loads.

Source: DeepSeek-V3 technical report, section 2.1.2 (auxiliary-loss-free load balancing).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from megablocks_utils.fsdp.materialize import FillLocal
from megablocks_utils.training.step.routers import CorrectionBias
from megablocks_utils.training.step.routing_counts import RoutingCounts

__all__ = ["RouterBalance", "as_buffer"]


class RouterBalance:
    """Count the tokens of every expert in forward passes, and move the biases after a step.

    Args:
        biases: those that move; they must be plain tensors, the same on every rank.
        experts: the experts modules by name, as they are called.
        rate: what a bias moves by.
        device: where the counts are.

    Attributes:
        routing: what is counted on this rank.
    """

    def __init__(
        self,
        biases: Sequence[CorrectionBias],
        experts: Mapping[str, nn.Module],
        rate: float,
        device: torch.device,
    ) -> None:
        self._biases, self._rate = list(biases), rate
        self.routing = RoutingCounts(
            {bias.experts: experts[bias.experts] for bias in biases}, device
        )

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
        self.routing.sum_over_ranks()
        for bias in self._biases:
            counts = self.routing.tokens[bias.experts][:-1]
            # Whole numbers: the same on every rank and any number of ranks.
            signs = torch.sign(counts.sum() - counts * len(counts)).to(bias.tensor.dtype)
            moves = self._rate * (signs - signs.mean())
            bias.tensor.add_(moves.view_as(bias.tensor).to(bias.tensor.device))
        self.routing.clear()


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
