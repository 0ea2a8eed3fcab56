"""Which examples each step of a run holds: epochs, orders and step plans of this rank."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megablocks_utils.config import RunConfig
from megablocks_utils.training.data.batches import (
    MicroBatch,
    Packing,
    StepPlan,
    assign_examples,
    build_step_plan,
    steps_per_epoch,
)
from megablocks_utils.training.data.example_order import ExampleOrder, draw_mixture, epoch_order
from megablocks_utils.training.data.example_stream import StreamPosition
from megablocks_utils.training.data.examples import TokenizedExamples
from megablocks_utils.training.data.packed_rows import PackedRows, pack_examples
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
        num_units = len(self.order if self.rows is None else self.rows)
        return steps_per_epoch(num_units, world_size=self.num_data_ranks, **self._sizes())

    def epoch_after(self, step: int) -> float:
        """Return the passes over the data that are done after a step."""
        return step / self.steps_per_epoch

    def position_after(self, step: int) -> StreamPosition | None:
        """Return how far data that is read while training is read; None for other data."""
        return None

    @cached_property
    def order(self) -> ExampleOrder:
        """The examples of every epoch."""
        data, seed, counts = self.config.data, self.config.seed, self.examples.counts
        draws = None if data.data_weights is None else draw_mixture(counts, data.data_weights, seed)
        return ExampleOrder(counts, seed, data.shuffle, draws)

    @cached_property
    def rows(self) -> PackedRows | None:
        """The rows that are filled with examples; None where each example is by itself.

        They are made once, in the order of the first epoch, so that all epochs are equally long.

        Raises:
            DataError: an example does not fit into a row.
        """
        length = self.config.data.packing_length
        if length is None:
            return None
        return pack_examples(self.examples, self.order.of_epoch(0), length)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run: `max_steps`, or those of all epochs, whole and in part."""
        optim = self.config.optim
        if optim.max_steps > 0:
            return optim.max_steps
        return max(1, math.ceil(optim.num_train_epochs * self.steps_per_epoch))

    def describe_order(self) -> str:
        """Say what becomes of the examples in an epoch, as the end of a sentence; else nothing."""
        parts = []
        if self.config.data.data_weights is not None:
            parts.append(f"; {len(self.order):,} drawn an epoch")
        if self.rows is not None:
            filled = self.rows.lengths.mean() / (self.config.data.packing_length or 1)
            parts.append(f"; {len(self.rows):,} rows, {filled:.1%} full")
        return "".join(parts)

    def largest_micro_batch(self) -> tuple[int, int, int]:
        """Return tokens, labels and examples of the largest micro-batch that any rank will see.

        Padding counts as tokens.

        In a very long run that is the longest examples of all together: such orders come.
        """
        lengths = self._units.lengths
        if self.num_steps > MAX_STEPS_SEARCHED:
            room = self._sizes()["per_device_train_batch_size"]
            return self._size_of(np.argsort(-lengths, kind="stable")[:room])
        largest = (0, 0, 0)
        for size, chosen in self._steps_by_bound():
            if size < largest[0]:
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
        lengths, labels = self._units.lengths[row], self._units.num_label_tokens[row]
        num_examples = len(row) if self.rows is None else len(self.rows.expand(row.tolist()))
        return self._room_of(lengths), int(labels.sum()), num_examples

    @property
    def _units(self) -> TokenizedExamples | PackedRows:
        """What is assigned to micro-batches."""
        return self.examples if self.rows is None else self.rows

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
                longest = np.sort(self._units.lengths[chosen])[::-1]
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
            yield self.epoch_after(step), plan

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
            yield self._plan(self.examples, order, step - start)

    def _plan(self, examples: TokenizedExamples, order: Sequence[int], step: int) -> StepPlan:
        """Build this rank's part of a step of an epoch."""
        plan = build_step_plan(
            examples,
            order,
            step,
            world_size=self.num_data_ranks,
            rank=self.data_rank,
            packing=self.packing,
            rows=self.rows,
            **self._sizes(),
        )
        batches = [self.take_part(batch) for batch in plan.micro_batches]
        return replace(plan, micro_batches=batches)

    def take_part(self, batch: MicroBatch) -> MicroBatch:
        """Return a micro-batch of which this rank has its part of every row."""
        parallel = self.config.parallel
        part = self.rank // parallel.tp_size % parallel.sp_size
        return batch if parallel.sp_size == 1 else take_part(batch, parallel.sp_size, part)

    def _order(self, epoch: int) -> list[int]:
        if self.rows is None:
            return self.order.of_epoch(epoch)
        return epoch_order(len(self.rows), self.config.seed, epoch, self.config.data.shuffle)

    def _sizes(self) -> dict[str, int]:
        optim = self.config.optim
        return {
            "per_device_train_batch_size": optim.per_device_train_batch_size,
            "gradient_accumulation_steps": optim.gradient_accumulation_steps,
        }
