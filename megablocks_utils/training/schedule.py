"""Which examples each step of a run holds: epochs, orders and step plans of this rank."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megablocks_utils.config import RunConfig
from megablocks_utils.training.batches import (
    StepPlan,
    build_step_plan,
    epoch_order,
    steps_per_epoch,
)
from megablocks_utils.training.data import TokenizedExamples


@dataclass(frozen=True)
class Schedule:
    """Steps of a run for one rank.

    Attributes:
        config: the run.
        examples: all of them, the same on every rank.
        rank: this rank.
        world_size: ranks of the run, each with its own examples.
    """

    config: RunConfig
    examples: TokenizedExamples
    rank: int
    world_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data; the last may be smaller."""
        return steps_per_epoch(len(self.examples), world_size=self.world_size, **self._sizes())

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run: `--max_steps`, or else whole and part epochs."""
        optim = self.config.optim
        if optim.max_steps > 0:
            return optim.max_steps
        return max(1, math.ceil(optim.num_train_epochs * self.steps_per_epoch))

    def plans(self) -> Iterator[tuple[float, StepPlan]]:
        """Yield the epochs done after each step, and this rank's part of the step."""
        num_epochs = math.ceil(self.num_steps / self.steps_per_epoch)
        plans = (plan for epoch in range(num_epochs) for plan in self.plans_of_epoch(epoch))
        for step, plan in zip(range(1, self.num_steps + 1), plans, strict=False):
            yield step / self.steps_per_epoch, plan

    def plans_of_epoch(self, epoch: int) -> Iterator[StepPlan]:
        """Yield this rank's part of every step of a whole epoch, counted from 0."""
        order = self._order(epoch)
        for step in range(self.steps_per_epoch):
            yield build_step_plan(
                self.examples,
                order,
                step,
                world_size=self.world_size,
                rank=self.rank,
                **self._sizes(),
            )

    def _order(self, epoch: int) -> list[int]:
        config = self.config
        return epoch_order(len(self.examples), config.seed, epoch, config.data.shuffle)

    def _sizes(self) -> dict[str, int]:
        optim = self.config.optim
        return {
            "per_device_train_batch_size": optim.per_device_train_batch_size,
            "gradient_accumulation_steps": optim.gradient_accumulation_steps,
        }
