"""Measure what the experts of every layer have to do in a step, over all ranks."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megablocks_utils.mesh.device_mesh import EP_AXIS, EXPERT_TP_AXIS, axis_size
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.training.report.expert_load import StepLoads, describe_layer
from megablocks_utils.training.step.routing_counts import RoutingCounts

__all__ = ["ExpertLoads"]


class ExpertLoads:
    """Count the tokens of every expert in each N-th step, and reduce them over the world.

    Args:
        experts: the experts modules by name, as they are called; split over ranks or not.
        every: N.
        device: where this rank computes.

    Attributes:
        routing: what is counted on this rank.
    """

    def __init__(self, experts: Mapping[str, nn.Module], every: int, device: torch.device) -> None:
        self._every = every
        self.routing = RoutingCounts(experts, device, with_margins=True)
        self.routing.is_on = False
        self._group, self._num_groups, self._ep_size = 0, 1, 1
        self._experts = experts
        for module in experts.values():
            if isinstance(module, DroplessExperts):
                self._ep_size = axis_size(module.mesh, EP_AXIS)
                # ep and expert_tp are the innermost axes.
                group_size = self._ep_size * axis_size(module.mesh, EXPERT_TP_AXIS)
                self._num_groups = module.mesh.size() // group_size
                self._group = dist.get_rank() // group_size

    def start_step(self, step: int) -> None:
        """Begin to count if `step` is one of those that are measured."""
        self.routing.is_on = step % self._every == 0
        if self.routing.is_on:
            self.routing.clear()

    def finish_step(self, step: int) -> StepLoads | None:
        """Return the loads of the global batch; None in a step that is not measured.

        **Collective:** in one that is, an all-reduce over the world; every rank must call.
        """
        if not self.routing.is_on:
            return None
        self.routing.is_on = False
        parts = list(self._parts())
        numbers = torch.cat([part.flatten().double() for part in parts])
        if dist.is_initialized():
            dist.all_reduce(numbers)
        reduced = iter(numbers.split([part.numel() for part in parts]))
        layers = []
        for name in self.routing.tokens:
            *tokens, _no_expert = next(reduced).tolist()
            margin, num_margins = next(reduced).tolist()
            groups = next(reduced).view(-1, self._ep_size).tolist()
            if sum(tokens):
                top1_margin = margin / num_margins if num_margins else None
                layers.append(describe_layer(name, tokens, groups, top1_margin))
        return StepLoads(step, tuple(layers))

    def _parts(self) -> Iterator[Tensor]:
        """Yield for each layer its counts, its margins, and rows of each rank, by ep group."""
        for name, tokens in self.routing.tokens.items():
            yield tokens
            yield self.routing.margins[name]
            # Experts of an ep group run what its own ranks route; the others have their own.
            rows = tokens.new_zeros(self._num_groups, self._ep_size, dtype=torch.float64)
            slots = getattr(self._experts[name], "slots", None)
            of_experts = tokens[:-1] if slots is None else tokens[list(slots.experts)]
            of_ranks = of_experts.view(self._ep_size, -1).sum(-1)
            # Rows of zero experts go to all ranks in turn, see `moe.zero_experts`.
            rows[self._group] = of_ranks + tokens[-1] / self._ep_size
            yield rows
