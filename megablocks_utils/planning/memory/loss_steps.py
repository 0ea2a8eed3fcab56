"""Go through the output head and the loss, with all logits at once or in blocks."""

from abc import ABC, abstractmethod

from megablocks_utils.planning.memory.ledger import Ledger
from megablocks_utils.planning.memory.loss_blocks import block_length
from megablocks_utils.planning.memory.model_stages import HeadPlan
from megablocks_utils.planning.memory.sizes import FP32, Sizes
from megablocks_utils.planning.memory.stages import ACTIVATIONS

__all__ = ["LossSteps", "build_loss_steps"]


class LossSteps(ABC):
    """What the head and the loss hold, in the order of a micro-step.

    The head's weights are gathered in the first and the last step only.

    Args:
        sizes: of the run.
        head: its head.
        ledger: to book in.
    """

    def __init__(self, sizes: Sizes, head: HeadPlan, ledger: Ledger) -> None:
        self._sizes = sizes
        self._head = head
        self._ledger = ledger

    @abstractmethod
    def compute_head(self) -> None:
        """Pass the head, after the final norm."""

    @abstractmethod
    def compute_loss(self) -> None:
        """Pass the loss."""

    @abstractmethod
    def backward_loss(self) -> None:
        """Go back through the loss."""

    @abstractmethod
    def backward_head(self) -> None:
        """Go back through the head, whose weights' gradient is held already."""


class _WholeLogits(LossSteps):
    def compute_head(self) -> None:
        ledger, head = self._ledger, self._head
        ledger.hold(ACTIVATIONS, head.saved_rows)
        ledger.hold(ACTIVATIONS, head.logits)
        ledger.transient(ACTIVATIONS, head.rows - head.saved_rows + self._sizes.hidden_bytes)

    def compute_loss(self) -> None:
        """Pass log-softmax in fp32, whose result is kept."""
        ledger, head = self._ledger, self._head
        ledger.transient(ACTIVATIONS, head.logits_fp32 * (1 + self._sizes.casts))
        ledger.hold(ACTIVATIONS, head.logits_fp32)
        ledger.free(ACTIVATIONS, head.logits)

    def backward_loss(self) -> None:
        """Go back through log-softmax; the gradients of the logits are left."""
        ledger, head = self._ledger, self._head
        ledger.transient(ACTIVATIONS, 2 * head.logits_fp32)
        ledger.transient(ACTIVATIONS, head.logits * self._sizes.casts)
        ledger.hold(ACTIVATIONS, head.logits - head.logits_fp32)

    def backward_head(self) -> None:
        ledger, head = self._ledger, self._head
        ledger.transient(ACTIVATIONS, head.rows)
        ledger.free(ACTIVATIONS, head.logits + head.saved_rows)


class _Blocks(LossSteps):
    """The loss is part of the head; see `training.step.linear_cross_entropy`."""

    def __init__(self, sizes: Sizes, head: HeadPlan, ledger: Ledger) -> None:
        super().__init__(sizes, head, ledger)
        self._rows, self._vocab_size = head.own_rows, sizes.shape.vocab_size
        # The gradients of the rows, and of a trained head the rows and a number of each.
        self._kept = head.own_rows_bytes + head.saved_rows + self._rows * FP32 * sizes.trains_all
        self._kept += head.gathered * sizes.trains_all

    def compute_head(self) -> None:
        ledger, head = self._ledger, self._head
        ledger.hold(ACTIVATIONS, self._kept)
        block = block_length(self._rows, self._vocab_size) * self._vocab_size
        log_softmax = block * 2 * FP32
        beside = head.rows - head.saved_rows + self._sizes.hidden_bytes
        beside += head.gathered * (not self._sizes.trains_all)
        ledger.transient(ACTIVATIONS, log_softmax + beside + 2 * self._rows * FP32)

    def compute_loss(self) -> None:
        """Nothing is left to do."""

    def backward_loss(self) -> None:
        """Go back through nothing."""

    def backward_head(self) -> None:
        ledger, head, sizes = self._ledger, self._head, self._sizes
        block = self._rows * block_length(self._vocab_size, self._rows) * sizes.trains_all
        beside = head.rows + block * (FP32 + sizes.compute)
        # Of a head that is split, the whole gradient comes first, and this rank's part of it after.
        whole = head.gathered * sizes.trains_all
        own = head.gradient if whole else 0
        ledger.transient(ACTIVATIONS, whole + max(0, beside - own))
        ledger.free(ACTIVATIONS, self._kept)


def build_loss_steps(sizes: Sizes, head: HeadPlan, ledger: Ledger) -> LossSteps:
    """Return the steps of a run, see `PlannedRun.has_whole_logits`."""
    steps = _WholeLogits if sizes.run.has_whole_logits else _Blocks
    return steps(sizes, head, ledger)
