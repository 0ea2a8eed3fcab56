"""A decoder layer as stages of a forward pass: what each keeps for backward, and what it passes.

Legend: T tokens of this rank, H hidden size, I intermediate size of an expert, L experts held,
N = T * K rows that a rank routes, R rows that it receives.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

__all__ = ["ACTIVATIONS", "DISPATCH", "Stage"]

ACTIVATIONS, DISPATCH = "activations", "dispatch_buffers"


@dataclass(frozen=True)
class Stage:
    """A piece of a layer; bytes by what they are.

    Attributes:
        name: what is computed.
        component: where its memory is booked.
        saved: kept from its forward to its backward pass.
        forward: held besides at its forward pass's fullest.
        backward: held besides at its backward pass's fullest, `saved` being there.
        gradients: bytes of the gradients of its weights, in the dtype of compute.
        kept: what selective checkpointing keeps from the forward pass to its repetition.
        named: of `saved`, what names of Python hold until the experts are done, saved or not.
    """

    name: str
    component: str = ACTIVATIONS
    saved: Mapping[str, int] = field(default_factory=dict)
    forward: Mapping[str, int] = field(default_factory=dict)
    backward: Mapping[str, int] = field(default_factory=dict)
    gradients: int = 0
    kept: int = 0
    named: int = 0

    @cached_property
    def saved_bytes(self) -> int:
        """Sum of what is saved."""
        return sum(self.saved.values())

    @cached_property
    def forward_bytes(self) -> int:
        """Sum of what the forward pass holds besides."""
        return sum(self.forward.values())

    @cached_property
    def backward_bytes(self) -> int:
        """Sum of what the backward pass holds besides."""
        return sum(self.backward.values())
