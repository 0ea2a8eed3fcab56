"""One way to run a layer, in a form that is checked and measured whoever made it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.moe_layer.inputs import LayerInputs


class SkippedError(Exception):
    """Report that a side cannot run a case: not installed, or not made for it."""


@dataclass(frozen=True)
class LayerSide:
    """A layer that holds its weights.

    Attributes:
        run: (tokens, top_k_index, top_k_weights) -> (T, H).
        trained: what has a gradient, by the names of `LayerWeights`, in the form of this side.
        constants: everything that lives longer than a step.
        to_common: gradients by those names, brought to the form of `LayerWeights`.
        note: what a reader of the row must know; may be empty.
    """

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    trained: dict[str, Tensor]
    constants: tuple[Tensor, ...]
    to_common: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    note: str = ""

    def forward(self, inputs: LayerInputs) -> Tensor:
        """Run the layer, keeping what its backward pass needs."""
        return self.run(inputs.tokens, inputs.top_k_index, inputs.top_k_weights)

    def step(self, inputs: LayerInputs) -> tuple[Tensor, ...]:
        """Run forward and backward; return the output and the gradients that are needed."""
        output = self.forward(inputs)
        wanted = [*inputs.leaves().values(), *self.trained.values()]
        return output.detach(), *torch.autograd.grad(output, wanted, inputs.upstream)

    def results(self, inputs: LayerInputs) -> dict[str, Tensor]:
        """Return the output and every gradient by name, in the common form."""
        names = ["output", *inputs.leaves(), *self.trained]
        found = dict(zip(names, self.step(inputs), strict=True))
        return {name: self.to_common.get(name, _as_it_is)(t) for name, t in found.items()}


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
