"""The schedule knows its largest micro-batch without building them all."""

import numpy as np
import pytest

from megablocks_utils.config import DataConfig, OptimConfig, ParallelConfig, RunConfig
from megablocks_utils.errors import DataError
from megablocks_utils.training.data.example_order import ExampleOrder, draw_mixture
from megablocks_utils.training.data.schedule import Schedule
from tests.support.tokenized import examples_of


def build_schedule(rank, world_size, batch_size, accumulation, sp_size=1, data=None, **optim):
    generator = np.random.default_rng(3)
    examples = [([1] * n, [1] * n) for n in generator.integers(2, 200, 61)]
    config = RunConfig(
        data=data or DataConfig(shuffle=True),
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
        ((4, 1, 2), {"num_train_epochs": 2.0, "data": DataConfig(packing_length=256)}),
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


def seen_examples(world_size, batch_size, accumulation, data):
    """Return the global batches, each as its examples' lengths in no order."""
    ranks = [
        build_schedule(rank, world_size, batch_size, accumulation, data=data, num_train_epochs=2.0)
        for rank in range(world_size)
    ]
    return [
        sorted(n for _, plan in plans for batch in plan.micro_batches if not batch.is_dummy
               for n in batch.lengths)
        for plans in zip(*(schedule.plans() for schedule in ranks), strict=True)
    ]  # fmt: skip


def test_packed_rows_are_full_and_the_same_on_any_number_of_ranks():
    data = DataConfig(packing_length=256)
    schedule = build_schedule(0, 1, 2, 2, data=data)
    rows = schedule.rows
    assert sorted(rows.examples.tolist()) == list(range(61))
    assert rows.lengths.max() <= 256 and rows.lengths.mean() > 0.9 * 256
    assert rows.num_label_tokens.sum() == schedule.examples.num_label_tokens.sum()
    # First fit: what opens a row fits into no row before it.
    lengths = schedule.examples.lengths
    opened = [rows.expand([row])[0] for row in range(len(rows))]
    place = {example: at for at, example in enumerate(schedule.order.of_epoch(0))}
    for row, example in enumerate(opened):
        for before in range(row):
            held = sum(
                lengths[e] for e in rows.expand([before]) if place[e] < place[example]
            )  # fmt: skip
            assert held + lengths[example] > 256
    assert (
        seen_examples(1, 4, 1, data) == seen_examples(2, 1, 2, data) == seen_examples(4, 1, 1, data)
    )
    with pytest.raises(DataError) as caught:
        _ = build_schedule(0, 1, 2, 2, data=DataConfig(packing_length=150)).num_steps
    assert caught.value.as_options() == (
        f"--packing_length is 150, but an example has {lengths.max()} tokens: it must be at least "
        "as many, or --max_seq_length, which cuts examples, at most 150"
    )


def test_weights_draw_as_interleave_datasets_does():
    from datasets import Dataset, interleave_datasets

    counts, weights = (30, 200, 500), (0.5, 0.2, 0.3)
    draws = draw_mixture(counts, [10 * w for w in weights], seed=7)
    sources = [
        Dataset.from_dict({"it": [f"{s} {n}" for n in range(c)]}) for s, c in enumerate(counts)
    ]
    wanted = interleave_datasets(sources, weights, seed=7, stopping_strategy="first_exhausted")[
        "it"
    ]
    starts = np.cumsum([0, *counts])
    source = np.searchsorted(starts, draws, side="right") - 1
    assert [f"{s} {n - starts[s]}" for s, n in zip(source, draws, strict=True)] == list(wanted)
    order = ExampleOrder(counts, seed=7, shuffle=True, draws=draws)
    first, second = order.of_epoch(0), order.of_epoch(1)
    assert len(order) == len(first) == len(set(first)) and first != second
    assert (np.searchsorted(starts, second, side="right") - 1 == source).all()
    assert sorted(first)[:30] == list(range(30)), "the one that is used up comes whole"
    assert set(first) != set(second), "of the others, each epoch has its own"
