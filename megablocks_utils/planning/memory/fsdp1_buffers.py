"""What FSDP1 holds beside its shards, event by event, with `FULL_SHARD` and `BACKWARD_PRE`.

An all-gather writes straight into the whole flat parameter. The root's (embedding, final norm and
output head) stays whole from the start of forward to the end of backward. Autograd joins the
parameters' gradients into one flat gradient before it is reduced.
"""

from collections.abc import Sequence

from megablocks_utils.planning.memory.fsdp2_buffers import Accumulation
from megablocks_utils.planning.memory.fsdp_units import FsdpUnit
from megablocks_utils.planning.memory.ledger import Ledger

__all__ = ["Fsdp1Buffers"]

_BUFFERS, _GRADIENTS = "fsdp_buffers", "gradients"


class Fsdp1Buffers:
    """The buffers of one micro-step; the same calls as `Fsdp2Buffers` takes.

    Args:
        ledger: to book them in.
        order: units in the order in which the forward pass is done with them.
        accumulation: where in the step.
    """

    def __init__(
        self, ledger: Ledger, order: Sequence[FsdpUnit], accumulation: Accumulation
    ) -> None:
        self._ledger = ledger
        self._order = order
        self._accumulation = accumulation
        self._place = len(order) - 1
        self._is_ahead = False
        self._frozen = 0

    def enter(self, unit: FsdpUnit) -> None:
        """Gather a unit's weights before it computes."""
        self._ledger.transient(_BUFFERS, unit.buffer_bytes + unit.cast_bytes)
        self._ledger.hold(_BUFFERS, unit.buffer_bytes)

    def leave(self, unit: FsdpUnit) -> None:
        """Free the whole weights."""
        self._ledger.free(_BUFFERS, unit.buffer_bytes)

    def end_forward(self) -> None:
        """Do nothing: no buffer outlives its unit."""

    def enter_backward(self, unit: FsdpUnit, *, is_whole: bool = False) -> None:
        """Have a unit's weights for its backward pass, and gather those of the next one ahead."""
        if not unit.is_fsdp:
            return
        if not is_whole and not self._is_ahead:
            self.enter(unit)
        self._place -= 1
        self._is_ahead = self._place >= 0
        if self._is_ahead:
            self.enter(self._order[self._place])
        self._free_frozen()

    def holds_gradients(self, unit: FsdpUnit) -> bool:
        """Say that gradients lie side by side until they are joined."""
        return bool(unit.num_trained)

    def leave_backward(self, unit: FsdpUnit, gradient_bytes: int, *, is_whole: bool = True) -> None:
        """Free the whole weights, join the gradients, and reduce them."""
        ledger, accumulation = self._ledger, self._accumulation
        if not unit.num_trained:
            # Its turn comes with the gradient of its input, which the next unit hears of first.
            self._frozen += unit.buffer_bytes
            return
        joined = unit.flat_gradient_bytes
        ledger.hold(_BUFFERS, joined)
        ledger.free(_BUFFERS, gradient_bytes + unit.buffer_bytes * is_whole)
        # An earlier one, which this one has been added to, has its place.
        widened = unit.reduced_bytes if unit.reduced_bytes != joined else 0
        ledger.hold(_BUFFERS, widened)
        if accumulation.has_reduced:
            ledger.transient(_BUFFERS, unit.trained_bytes)
        else:
            ledger.hold(_GRADIENTS, unit.trained_bytes)
        ledger.free(_BUFFERS, widened + joined * (1 + accumulation.has_unreduced))

    def end_backward(self) -> None:
        """Free what the last unit has left."""
        self._free_frozen()

    def _free_frozen(self) -> None:
        self._ledger.free(_BUFFERS, self._frozen)
        self._frozen = 0
