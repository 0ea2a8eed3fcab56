"""One way to do the work of a case, in one form for everybody's code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer


class SkippedError(Exception):
    """Report that a contender cannot run a case: not installed, or not made for it."""


@dataclass(frozen=True)
class Contender:
    """A module with its weights and the inputs of a case.

    Attributes:
        forward: one forward pass.
        inputs: leaves whose gradients are wanted, by name.
        trained: leaves that are trained, by names that all contenders share.
        constants: everything that lives longer than a step.
        upstream: gradient of the output; None where that is a loss.
        optimizer: of `trained`; None where a step ends with the gradients.
        to_common: by name, what brings a result to the form that is compared.
        note: what a reader of the row must know; may be empty.
    """

    forward: Callable[[], Tensor]
    inputs: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]
    constants: tuple[Tensor, ...]
    upstream: Tensor | None = None
    optimizer: Optimizer | None = None
    to_common: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    note: str = ""

    def step(self) -> tuple[Tensor, ...]:
        """Run forward, backward and the optimizer; return the output and the gradients."""
        output = self.forward()
        leaves = [*self.inputs.values(), *self.trained.values()]
        gradients = torch.autograd.grad(output, leaves, self.upstream)
        if self.optimizer is not None:
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient
            self.optimizer.step()
            self.optimizer.zero_grad()
        return output.detach(), *gradients

    def results(self) -> dict[str, Tensor]:
        """Return the output and every gradient by name, in the common form."""
        names = ["output", *self.inputs, *self.trained]
        found = dict(zip(names, self.step(), strict=True))
        return {name: self.to_common.get(name, _unchanged)(t) for name, t in found.items()}


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
