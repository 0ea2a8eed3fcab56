"""Which examples each step of a run holds, where they are read while it trains."""

from collections.abc import Iterator
from dataclasses import dataclass

from megablocks_utils.training.data.batches import StepPlan
from megablocks_utils.training.data.example_stream import StreamPosition, StreamReader
from megablocks_utils.training.data.schedule import Schedule

__all__ = ["StreamedSchedule"]


@dataclass(frozen=True, kw_only=True)
class StreamedSchedule(Schedule):
    """Steps of a run for one rank; `examples` are the first ones alone, for what they show.

    How long the data is, is not known: all steps count as one epoch.

    Attributes:
        reader: gives the global batches in turn.
    """

    reader: StreamReader

    @property
    def steps_per_epoch(self) -> int:
        """All steps of the run."""
        return self.num_steps

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.config.optim.max_steps

    def epoch_after(self, step: int) -> float:
        """Return the passes over the data that are over after one of the last steps."""
        return float(self.reader.position_after(step).epoch)

    def position_after(self, step: int) -> StreamPosition:
        """Return how far the data is read after one of the last steps."""
        return self.reader.position_after(step)

    def describe_order(self) -> str:
        """Say that more comes than was looked at."""
        return " of the first records; the others are read while it trains"

    def largest_micro_batch(self) -> tuple[int, int, int]:
        """Return what no micro-batch exceeds: all its examples as long as they may be."""
        room = self.config.optim.per_device_train_batch_size
        tokens = room * self.config.data.max_seq_length
        return tokens, tokens - room, room

    def plans_of_epoch(self, epoch: int, first_step: int = 0) -> Iterator[StepPlan]:
        """Yield this rank's part of every step.

        **Collective:** one broadcast over the world for each step.
        """
        for _ in range(first_step, self.num_steps if epoch == 0 else 0):
            batch = self.reader.next_batch()
            yield self._plan(batch, range(len(batch)), 0)
