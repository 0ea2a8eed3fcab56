"""The schedule knows its largest micro-batch without building them all."""

import numpy as np
import pytest

from megablocks_utils.config import DataConfig, OptimConfig, ParallelConfig, RunConfig
from megablocks_utils.training.data.schedule import Schedule
from tests.support.tokenized import examples_of


def build_schedule(rank, world_size, batch_size, accumulation, sp_size=1, **optim):
    generator = np.random.default_rng(3)
    examples = [([1] * n, [1] * n) for n in generator.integers(2, 200, 61)]
    config = RunConfig(
        data=DataConfig(shuffle=True),
        parallel=ParallelConfig(sp_size=sp_size),
        optim=OptimConfig(
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **optim,
        ),
    )
    return Schedule(config, examples_of(examples), rank, world_size)


def all_micro_batches(world_size, *sizes, **optim):
    """Build every micro-batch of every rank: (tokens, labels, examples) of each."""
    for rank in range(world_size):
        for _, plan in build_schedule(rank, world_size, *sizes, **optim).plans():
            for batch in plan.micro_batches:
                starts = int((batch.position_ids == 0).sum())
                yield batch.input_ids.numel(), int((batch.labels != -100).sum()), starts


@pytest.mark.parametrize(
    ("sizes", "optim"),
    [
        ((1, 1, 1), {"num_train_epochs": 1.0}),
        ((4, 1, 2), {"num_train_epochs": 2.0}),
        ((2, 4, 2), {"num_train_epochs": 3.0}),  # where the longest do not meet in one micro-batch
        ((4, 3, 1), {"max_steps": 2}),  # steps that are not taken do not count
    ],
)
def test_the_largest_micro_batch_of_all_ranks_and_steps(sizes, optim):
    largest = build_schedule(0, *sizes, **optim).largest_micro_batch()
    assert largest == max(all_micro_batches(*sizes, **optim))


def test_the_largest_micro_batch_of_a_run_without_end_is_found_at_once():
    endless = build_schedule(0, 2, 3, 1, max_steps=10**20)
    longest = np.sort(endless.examples.lengths)[-3:]
    tokens, labels, examples = endless.largest_micro_batch()
    assert (tokens, labels, examples) == (longest.sum(), longest.sum() - 3, 3)
    finite = build_schedule(0, 2, 3, 1, max_steps=200).largest_micro_batch()
    assert finite <= (tokens, labels, examples)


def test_ranks_of_a_group_share_the_examples_of_one_data_rank():
    alone = [build_schedule(rank, 2, 3, 2) for rank in range(2)]
    grouped = [build_schedule(rank, 4, 3, 2, sp_size=2) for rank in range(4)]
    assert [schedule.data_rank for schedule in grouped] == [0, 0, 1, 1]
    assert {schedule.num_steps for schedule in grouped} == {alone[0].num_steps}
    for schedule in grouped:
        own = [plan.num_label_tokens for _, plan in schedule.plans()]
        assert own == [plan.num_label_tokens for _, plan in alone[schedule.data_rank].plans()]
    assert grouped[0].config.count_global_batch(4) == alone[0].config.count_global_batch(2)
