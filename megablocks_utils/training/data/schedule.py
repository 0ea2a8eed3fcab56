"""Which examples each step of a run holds: epochs, orders and step plans of this rank."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from megablocks_utils.config import RunConfig
from megablocks_utils.training.data.batches import (
    MicroBatch,
    Packing,
    StepPlan,
    assign_examples,
    build_step_plan,
    epoch_order,
    steps_per_epoch,
)
from megablocks_utils.training.data.examples import TokenizedExamples
from megablocks_utils.training.data.row_parts import take_part

MAX_STEPS_SEARCHED = 20_000
"""Steps that are looked at one by one for the largest micro-batch: 0.2 s."""


@dataclass(frozen=True)
class Schedule:
    """Steps of a run for one rank.

    Attributes:
        config: the run.
        examples: all of them, the same on every rank.
        rank: this rank.
        world_size: ranks of the run; those of a tp or sp group share their examples.
        packing: how the examples of a micro-batch are laid out.
    """

    config: RunConfig
    examples: TokenizedExamples
    rank: int
    world_size: int
    packing: Packing = Packing.POSITIONS

    @property
    def num_data_ranks(self) -> int:
        """Ranks with examples of their own."""
        return self.config.count_data_ranks(self.world_size)

    @property
    def data_rank(self) -> int:
        """Which of them has this rank's examples."""
        return self.rank // (self.world_size // self.num_data_ranks)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data; the last may be smaller."""
        return steps_per_epoch(len(self.examples), world_size=self.num_data_ranks, **self._sizes())

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run: `max_steps`, or those of all epochs, whole and in part."""
        optim = self.config.optim
        if optim.max_steps > 0:
            return optim.max_steps
        return max(1, math.ceil(optim.num_train_epochs * self.steps_per_epoch))

    def largest_micro_batch(self) -> tuple[int, int, int]:
        """Return tokens, labels and examples of the largest micro-batch that any rank will see.

        Padding counts as tokens.

        In a very long run that is the longest examples of all together: such orders come.
        """
        lengths = self.examples.lengths
        if self.num_steps > MAX_STEPS_SEARCHED:
            room = self._sizes()["per_device_train_batch_size"]
            return self._size_of(np.argsort(-lengths, kind="stable")[:room])
        largest = (0, 0, 0)
        for size, chosen in self._steps_by_bound():
            if size <= largest[0]:
                break
            assigned = assign_examples(
                lengths[chosen].tolist(),
                world_size=self.num_data_ranks,
                is_padded=self.packing is Packing.PADDED,
                **self._sizes(),
            )
            for row in (chosen[row] for micro_step in assigned for row in micro_step):
                largest = max(largest, self._size_of(row))
        return largest

    def _size_of(self, row: np.ndarray) -> tuple[int, int, int]:
        lengths, labels = self.examples.lengths[row], self.examples.num_label_tokens[row]
        return self._room_of(lengths), int(labels.sum()), len(row)

    def _room_of(self, lengths: np.ndarray) -> int:
        """Return the tokens of a micro-batch of examples of these lengths."""
        if self.packing is Packing.PADDED:
            return int(lengths.max(initial=0)) * len(lengths)
        return int(lengths.sum())

    def _steps_by_bound(self) -> list[tuple[int, np.ndarray]]:
        """List the examples of every step, first the one that could have the largest micro-batch.

        It holds at most the longest examples of its step that there is room for.
        """
        sizes = self._sizes()
        room = sizes["per_device_train_batch_size"]
        num_batches = self.num_data_ranks * sizes["gradient_accumulation_steps"]
        steps = []
        for epoch in range(math.ceil(self.num_steps / self.steps_per_epoch)):
            order = np.array(self._order(epoch))
            done = epoch * self.steps_per_epoch
            for step in range(min(self.steps_per_epoch, self.num_steps - done)):
                chosen = order[step * num_batches * room : (step + 1) * num_batches * room]
                longest = np.sort(self.examples.lengths[chosen])[::-1]
                steps.append((self._room_of(longest[:room]), chosen))
        return sorted(steps, key=lambda item: -item[0])

    def plans(self, first_step: int = 0) -> Iterator[tuple[float, StepPlan]]:
        """Yield the epochs done after each step, and this rank's part of the step.

        Args:
            first_step: steps done before, whose plans are left out.
        """
        num_epochs = math.ceil(self.num_steps / self.steps_per_epoch)
        first_epoch = first_step // self.steps_per_epoch
        plans = (
            plan
            for epoch in range(first_epoch, num_epochs)
            for plan in self.plans_of_epoch(epoch, first_step)
        )
        for step, plan in enumerate(plans, start=first_step + 1):
            yield step / self.steps_per_epoch, plan

    def plans_of_epoch(self, epoch: int, first_step: int = 0) -> Iterator[StepPlan]:
        """Yield this rank's part of every step of an epoch, counted from 0.

        Args:
            epoch: which one.
            first_step: steps of the run done before, whose plans are left out.
        """
        order = self._order(epoch)
        start = epoch * self.steps_per_epoch
        stop = min(start + self.steps_per_epoch, self.num_steps)
        for step in range(max(start, first_step), stop):
            plan = build_step_plan(
                self.examples,
                order,
                step - start,
                world_size=self.num_data_ranks,
                rank=self.data_rank,
                packing=self.packing,
                **self._sizes(),
            )
            batches = [self._take_part(batch) for batch in plan.micro_batches]
            yield replace(plan, micro_batches=batches)

    def _take_part(self, batch: MicroBatch) -> MicroBatch:
        """Return a micro-batch of which this rank has its part of every row."""
        parallel = self.config.parallel
        part = self.rank // parallel.tp_size % parallel.sp_size
        return batch if parallel.sp_size == 1 else take_part(batch, parallel.sp_size, part)

    def _order(self, epoch: int) -> list[int]:
        config = self.config
        return epoch_order(len(self.examples), config.seed, epoch, config.data.shuffle)

    def _sizes(self) -> dict[str, int]:
        optim = self.config.optim
        return {
            "per_device_train_batch_size": optim.per_device_train_batch_size,
            "gradient_accumulation_steps": optim.gradient_accumulation_steps,
        }
