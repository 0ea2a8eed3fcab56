"""What FSDP2 holds beside its shards, event by event, as torch 2.13's `_fsdp_param_group` does.

One all-gather gives one buffer of all ranks' shards, which is copied into the whole parameters. In
forward the buffer stays until the next group has been copied, so that the two may overlap; in
backward it is freed at once, but the next group's is gathered ahead. A reduce-scatter reads one
buffer of all gradients, which stays until the next group's is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megablocks_utils.planning.memory.fsdp_units import FsdpUnit
from megablocks_utils.planning.memory.ledger import Ledger

__all__ = ["Accumulation", "Fsdp2Buffers"]

_BUFFERS, _GRADIENTS = "fsdp_buffers", "gradients"


@dataclass(frozen=True)
class Accumulation:
    """Where in an optimizer step a micro-step is.

    Attributes:
        reduces: whether it reduces its gradients over the ranks.
        has_reduced: whether earlier micro-steps have left reduced gradients.
        has_unreduced: whether they have left unreduced ones.
    """

    reduces: bool
    has_reduced: bool
    has_unreduced: bool


class Fsdp2Buffers:
    """The buffers of one micro-step.

    Args:
        ledger: to book them in.
        order: groups in the order in which the forward pass is done with them.
        accumulation: where in the step.
        num_not_gathered: groups at the front of `order` whose weights backward does not need.
    """

    def __init__(
        self,
        ledger: Ledger,
        order: Sequence[FsdpUnit],
        accumulation: Accumulation,
        *,
        num_not_gathered: int,
    ) -> None:
        self._ledger = ledger
        self._order = order
        self._accumulation = accumulation
        self._num_not_gathered = num_not_gathered
        self._place = len(order) - 1
        self._ahead = 0
        self._deferred = 0
        self._reduce_input = 0

    def enter(self, group: FsdpUnit) -> None:
        """Gather a group's weights before it computes, in forward or when computing again."""
        if not group.is_fsdp:
            return
        buffer = self._start(group)
        self._copy_out(group)
        self._ledger.free(_BUFFERS, self._deferred)
        self._deferred = buffer

    def leave(self, group: FsdpUnit) -> None:
        """Free the whole weights."""
        self._ledger.free(_BUFFERS, group.gathered_bytes)

    def end_forward(self) -> None:
        """Free the last buffer of the forward pass."""
        self._ledger.free(_BUFFERS, self._deferred)
        self._deferred = 0

    def enter_backward(self, group: FsdpUnit, *, is_whole: bool = False) -> None:
        """Have a group's weights for its backward pass, and gather those of the next one ahead.

        Args:
            group: whose backward pass begins.
            is_whole: whether its weights are whole already.
        """
        if not group.is_fsdp:
            return
        if not is_whole:
            buffer = self._start(group)
            self._copy_out(group)
            self._ledger.free(_BUFFERS, buffer)
        self._place -= 1
        if self._place >= self._num_not_gathered:
            self._ahead = self._order[self._place].buffer_bytes
            self._ledger.hold(_BUFFERS, self._ahead)

    def holds_gradients(self, group: FsdpUnit) -> bool:
        """Say whether a group's gradients lie side by side until its backward pass ends.

        Otherwise each is added to what earlier micro-steps have left as soon as it is made.
        """
        same_dtype = group.whole_gradient_bytes == group.whole_compute_bytes
        return not (self._accumulation.has_unreduced and same_dtype)

    def leave_backward(
        self, group: FsdpUnit, gradient_bytes: int, *, is_whole: bool = True
    ) -> None:
        """Free the whole weights, and reduce the gradients.

        Args:
            group: whose backward pass is done.
            gradient_bytes: of the whole, as autograd has left them.
            is_whole: whether its weights were whole.
        """
        ledger, accumulation = self._ledger, self._accumulation
        ledger.free(_BUFFERS, group.gathered_bytes * is_whole)
        if not accumulation.reduces:
            return
        ledger.free(_BUFFERS, self._reduce_input)
        self._reduce_input = group.reduced_bytes
        if not group.num_trained:
            return
        if accumulation.has_unreduced:
            ledger.free(_BUFFERS, gradient_bytes)
            gradient_bytes = group.whole_gradient_bytes
        ledger.transient(_BUFFERS, group.largest_restacked_bytes)
        ledger.hold(_BUFFERS, self._reduce_input)
        # FSDP's loop has the last gradient in hand when it makes room for the reduced ones.
        last = min(group.last_gradient_bytes, gradient_bytes)
        ledger.free(_BUFFERS, gradient_bytes - last)
        if accumulation.has_reduced:
            ledger.transient(_BUFFERS, group.trained_bytes)
        else:
            ledger.hold(_GRADIENTS, group.trained_bytes)
        ledger.free(_BUFFERS, last)

    def end_backward(self) -> None:
        """Free what the last groups have left."""
        self._ledger.free(_BUFFERS, self._reduce_input + self._deferred)
        self._reduce_input = self._deferred = 0

    def _start(self, group: FsdpUnit) -> int:
        """Have a group's gathered buffer, and return its size."""
        buffer = group.buffer_bytes
        if not self._ahead:
            self._ledger.transient(_BUFFERS, buffer + group.cast_bytes)
            self._ledger.hold(_BUFFERS, buffer)
        self._ahead = 0
        return buffer

    def _copy_out(self, group: FsdpUnit) -> None:
        self._ledger.hold(_BUFFERS, group.gathered_bytes)
        self._ledger.transient(_BUFFERS, group.restacked_bytes)
