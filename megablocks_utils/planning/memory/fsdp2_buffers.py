"""What FSDP2 holds beside its shards, event by event, as torch 2.13's `_fsdp_param_group` does.

One all-gather gives one buffer of all ranks' shards, which is copied into the whole parameters. In
forward the buffer stays until the next unit has been copied, so that the two may overlap; in
backward it is freed at once, but the next unit's is gathered ahead, as it is in forward where units
ask for each other's. A reduce-scatter reads one buffer of all gradients, which stays until the next
unit's is made. Shards in host memory are copied in before, and their gradients out afterwards.
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
        order: units in the order in which the forward pass is done with them.
        accumulation: where in the step.
        num_not_gathered: units at the front of `order` whose weights backward does not need.
        asking: units in the order of their forward passes that ask for the one after them.
        is_offloaded: whether shards lie in host memory.
    """

    def __init__(
        self,
        ledger: Ledger,
        order: Sequence[FsdpUnit],
        accumulation: Accumulation,
        *,
        num_not_gathered: int,
        asking: Sequence[FsdpUnit] = (),
        is_offloaded: bool = False,
    ) -> None:
        self._ledger = ledger
        self._order = order
        self._accumulation = accumulation
        self._num_not_gathered = num_not_gathered
        self._is_offloaded = is_offloaded
        self._to_ask = list(reversed(asking))
        self._place = len(order) - 1
        self._ahead = 0
        self._deferred = 0
        self._reduce_input = 0

    def enter(self, unit: FsdpUnit) -> None:
        """Gather a unit's weights before it computes, in forward or when computing again."""
        if not unit.is_fsdp:
            return
        buffer = self._start(unit)
        self._copy_out(unit)
        self._ledger.free(_BUFFERS, self._deferred)
        self._deferred = buffer
        if self._to_ask and self._to_ask[-1] is unit:
            self._to_ask.pop()
            if self._to_ask:
                self._gather_ahead(self._to_ask[-1])

    def leave(self, unit: FsdpUnit) -> None:
        """Free the whole weights."""
        self._ledger.free(_BUFFERS, unit.gathered_bytes)

    def end_forward(self) -> None:
        """Free the last buffer of the forward pass."""
        self._ledger.free(_BUFFERS, self._deferred)
        self._deferred = 0

    def enter_backward(self, unit: FsdpUnit, *, is_whole: bool = False) -> None:
        """Have a unit's weights for its backward pass, and gather those of the next one ahead.

        Args:
            unit: whose backward pass begins.
            is_whole: whether its weights are whole already.
        """
        if not unit.is_fsdp:
            return
        if not is_whole:
            buffer = self._start(unit)
            self._copy_out(unit)
            self._ledger.free(_BUFFERS, buffer)
        self._place -= 1
        if self._place >= self._num_not_gathered:
            self._gather_ahead(self._order[self._place])

    def holds_gradients(self, unit: FsdpUnit) -> bool:
        """Say whether a unit's gradients lie side by side until its backward pass ends.

        Otherwise each is added to what earlier micro-steps have left as soon as it is made.
        """
        same_dtype = unit.whole_gradient_bytes == unit.whole_compute_bytes
        return not (self._accumulation.has_unreduced and same_dtype)

    def leave_backward(self, unit: FsdpUnit, gradient_bytes: int, *, is_whole: bool = True) -> None:
        """Free the whole weights, and reduce the gradients.

        Args:
            unit: whose backward pass is done.
            gradient_bytes: of the whole, as autograd has left them.
            is_whole: whether its weights were whole.
        """
        ledger, accumulation = self._ledger, self._accumulation
        ledger.free(_BUFFERS, unit.gathered_bytes * is_whole)
        if not accumulation.reduces:
            return
        ledger.free(_BUFFERS, self._reduce_input)
        self._reduce_input = unit.reduced_bytes
        if not unit.num_trained:
            return
        if accumulation.has_unreduced:
            ledger.free(_BUFFERS, gradient_bytes)
            gradient_bytes = unit.whole_gradient_bytes
        ledger.transient(_BUFFERS, unit.largest_restacked_bytes)
        ledger.hold(_BUFFERS, self._reduce_input)
        # FSDP's loop has the last gradient in hand when it makes room for the reduced ones.
        last = min(unit.last_gradient_bytes, gradient_bytes)
        ledger.free(_BUFFERS, gradient_bytes - last)
        if unit.ranks == 1:
            ledger.transient(_BUFFERS, 2 * unit.trained_bytes)  # divided by 1, and copied
        if accumulation.has_reduced or self._is_offloaded:
            ledger.transient(_BUFFERS, unit.trained_bytes)
        else:
            ledger.hold(_GRADIENTS, unit.trained_bytes)
        ledger.free(_BUFFERS, last)

    def end_backward(self) -> None:
        """Free what the last units have left."""
        self._ledger.free(_BUFFERS, self._reduce_input + self._deferred)
        self._reduce_input = self._deferred = 0

    def _start(self, unit: FsdpUnit) -> int:
        """Have a unit's gathered buffer, and return its size."""
        if not self._ahead:
            self._gather(unit)
        self._ahead = 0
        return unit.buffer_bytes

    def _gather_ahead(self, unit: FsdpUnit) -> None:
        self._gather(unit)
        self._ahead = unit.buffer_bytes

    def _gather(self, unit: FsdpUnit) -> None:
        copied = unit.copied_in_bytes if self._is_offloaded else unit.cast_bytes
        self._ledger.transient(_BUFFERS, unit.buffer_bytes + copied)
        self._ledger.hold(_BUFFERS, unit.buffer_bytes)

    def _copy_out(self, unit: FsdpUnit) -> None:
        self._ledger.hold(_BUFFERS, unit.gathered_bytes)
        if self._is_offloaded and unit.ranks == 1:
            self._ledger.transient(_BUFFERS, unit.copied_alone_bytes)
        self._ledger.transient(_BUFFERS, unit.restacked_bytes)
