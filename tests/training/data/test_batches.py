"""Orders and step plans: every example once, the same global batches everywhere, little waiting."""

import numpy as np
import pytest
import torch

from megablocks_utils.training.data.batches import (
    assign_examples,
    build_step_plan,
    steps_per_epoch,
)
from megablocks_utils.training.data.example_order import epoch_order
from tests.support.tokenized import examples_of

LAYOUTS = [(1, 1, 8), (1, 4, 2), (2, 2, 2), (2, 1, 4), (4, 2, 1), (4, 1, 2)]
"""(world size, batch per device, accumulation), all with G = 8."""


def sizes_of(layout):
    names = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps")
    return dict(zip(names, layout, strict=True))


def make_examples(num_examples, seed=0, shortest=2, longest=60):
    """Examples whose every token is ``100 * index + position``, so that a row tells its origin."""
    lengths = np.random.RandomState(seed).randint(shortest, longest + 1, num_examples)
    encoded = []
    for index, length in enumerate(lengths):
        ids = [100 * index + position for position in range(length)]
        encoded.append((ids, [-100] * (length // 2) + ids[length // 2 :]))
    return examples_of(encoded)


def plans_of(examples, order, step, layout):
    sizes = sizes_of(layout)
    return [
        build_step_plan(examples, order, step, rank=rank, **sizes)
        for rank in range(sizes["world_size"])
    ]


def examples_in(plan):
    """Indices of a plan's examples, read from the tokens at position 0."""
    found = []
    for micro_batch in plan.micro_batches:
        if not micro_batch.is_dummy:
            starts = micro_batch.input_ids[micro_batch.position_ids == 0]
            found += (starts // 100).tolist()
    return found


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    assert epoch_order(8, seed=42, epoch=0, shuffle=True) == [3, 1, 5, 7, 4, 0, 6, 2]
    assert epoch_order(8, seed=42, epoch=1, shuffle=True) == [6, 5, 0, 4, 3, 1, 7, 2]
    assert epoch_order(8, seed=43, epoch=0, shuffle=True) == [0, 2, 4, 3, 6, 1, 5, 7]
    assert epoch_order(5, seed=42, epoch=3, shuffle=False) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_the_order_holds_every_example_once(seed):
    assert sorted(epoch_order(101, seed, epoch=2, shuffle=True)) == list(range(101))


def test_the_last_smaller_batch_counts_as_a_step():
    sizes = sizes_of((2, 2, 2))
    assert [steps_per_epoch(n, **sizes) for n in (0, 1, 8, 9, 16, 17)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_examples", [8, 11, 24, 31])
def test_global_batch_i_is_the_same_slice_of_the_order_on_any_number_of_ranks(layout, num_examples):
    examples = make_examples(num_examples)
    order = epoch_order(num_examples, seed=3, epoch=1, shuffle=True)
    for step in range(steps_per_epoch(num_examples, **sizes_of(layout))):
        wanted = order[step * 8 : (step + 1) * 8]
        plans = plans_of(examples, order, step, layout)
        assert sorted(i for plan in plans for i in examples_in(plan)) == sorted(wanted)
        assert {plan.num_label_tokens for plan in plans} == {
            sum(int(examples.num_label_tokens[i]) for i in wanted)
        }
        assert {plan.num_input_tokens for plan in plans} == {
            sum(int(examples.lengths[i]) for i in wanted)
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_is_its_examples_one_after_the_other(layout):
    examples = make_examples(13)
    for step in (0, 1):
        for plan in plans_of(examples, range(13), step, layout):
            for micro_batch in plan.micro_batches:
                if micro_batch.is_dummy:
                    continue
                indices = (micro_batch.input_ids[micro_batch.position_ids == 0] // 100).tolist()
                assert len(indices) <= layout[1]
                ids = np.concatenate([examples[i][0] for i in indices])
                labels = np.concatenate([examples[i][1] for i in indices])
                positions = np.concatenate([np.arange(examples.lengths[i]) for i in indices])
                assert micro_batch.input_ids.tolist() == [ids.tolist()]
                assert micro_batch.labels.tolist() == [labels.tolist()]
                assert micro_batch.position_ids.tolist() == [positions.tolist()]
                assert micro_batch.input_ids.dtype == torch.long


def test_a_rank_without_example_gets_one_token_and_no_label():
    plans = plans_of(make_examples(3), range(3), 0, (2, 2, 4))
    dummies = [[m.is_dummy for m in plan.micro_batches] for plan in plans]
    assert dummies == [[False, True, True, True], [False, True, True, True]]
    assert {plan.num_real_micro_batches for plan in plans} == {2}
    dummy = plans[0].micro_batches[3]
    assert dummy.input_ids.tolist() == [[0]]
    assert dummy.position_ids.tolist() == [[0]]
    assert dummy.labels.tolist() == [[-100]]

    plans = plans_of(make_examples(1), range(1), 0, (2, 1, 1))
    assert [plan.micro_batches[0].is_dummy for plan in plans] == [False, True]
    assert {plan.num_real_micro_batches for plan in plans} == {1}


def test_a_step_outside_the_epoch_is_refused():
    with pytest.raises(IndexError, match=r"^step 2 is not one of the epoch's 2$"):
        plans_of(make_examples(9), range(9), 2, (2, 2, 2))


@pytest.mark.parametrize("layout", [(2, 1, 4), (2, 4, 4), (4, 2, 8), (8, 3, 2), (3, 5, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_a_step_waits_for_less_than_its_longest_example(layout, seed):
    """The bound of the module's docstring, on lengths with a long tail as text has."""
    world_size, batch, accumulation = layout
    lengths = np.random.RandomState(seed).lognormal(4.5, 0.8, world_size * batch * accumulation)
    lengths = [int(length) + 2 for length in lengths]
    assigned = assign_examples(lengths, **sizes_of(layout))
    assert sorted(i for step in assigned for row in step for i in row) == list(range(len(lengths)))
    waits = []
    for micro_step in assigned:
        tokens = [sum(lengths[i] for i in row) for row in micro_step]
        waits.append(max(tokens) - min(tokens))
    assert sum(waits) < max(lengths)


def test_the_deal_of_a_known_batch():
    sizes = sizes_of((2, 2, 2))
    assigned = assign_examples([10, 80, 20, 70, 30, 60, 40, 50], **sizes)
    assert assigned == [[[1, 0], [3, 2]], [[5, 4], [7, 6]]]
    assert assign_examples([5, 9, 7], **sizes) == [[[2, 0], [1]], [[], []]]


@pytest.mark.parametrize("layout", [(2, 4, 4), (4, 4, 4), (8, 4, 4), (8, 16, 1)])
def test_ranks_wait_less_than_when_assigned_in_order(layout):
    """Mean share of the ranks' time that is work, over 10 batches with a long tail of lengths."""
    world_size, batch, accumulation = layout
    ours, in_order = [], []
    for seed in range(10):
        lengths = np.random.RandomState(seed).lognormal(4.5, 0.8, world_size * batch * accumulation)
        lengths = [int(length) + 2 for length in lengths]
        ours.append(work_share(assign_examples(lengths, **sizes_of(layout)), lengths))
        plain = np.arange(len(lengths)).reshape(accumulation, world_size, batch).tolist()
        in_order.append(work_share(plain, lengths))
    assert np.mean(ours) > 0.91
    assert np.mean(in_order) < 0.85


def work_share(assigned, lengths):
    slowest = [max(sum(lengths[i] for i in row) for row in step) for step in assigned]
    return sum(lengths) / (sum(slowest) * len(assigned[0]))
