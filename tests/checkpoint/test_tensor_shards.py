"""Shards: every run of elements, cut into blocks, is just that run."""

from itertools import combinations_with_replacement
from math import prod

import pytest
import torch

from megablocks_utils.checkpoint.tensor_shards import BlockPlace, RunPlace

SHAPES = [(1,), (7,), (1, 5), (5, 1), (3, 4), (2, 3, 4), (3, 1, 2), (2, 2, 2, 3)]


def window(block):
    sizes = block.tensor.shape
    return tuple(slice(o, o + n) for o, n in zip(block.offsets, sizes, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_run_is_cut_into_blocks_that_are_just_it(shape):
    numbers = torch.arange(prod(shape))
    for start, stop in combinations_with_replacement(range(len(numbers) + 1), 2):
        shard = RunPlace(shape, start).shard(numbers[start:stop])
        found = torch.full(shape, -1)
        for block in shard.blocks:
            assert (found[window(block)] == -1).all()  # no two overlap
            found[window(block)] = block.tensor
        wanted = torch.full((len(numbers),), -1)
        wanted[start:stop] = numbers[start:stop]
        assert torch.equal(found.view(-1), wanted), (start, stop)
        assert all(block.tensor.numel() for block in shard.blocks)
        # The two ends of each dim but the last, which needs one, and what is whole between them.
        assert len(shard.blocks) <= 2 * len(shape) - 1, (start, stop)


def test_blocks_are_views_that_can_be_filled():
    memory = torch.zeros(9)
    shard = RunPlace((3, 4), 2).shard(memory)  # 2 of row 0, row 1, 3 of row 2
    assert [block.offsets for block in shard.blocks] == [(0, 2), (1, 0), (2, 0)]
    for value, block in enumerate(shard.blocks, start=1):
        shard.tensor_at(block.offsets).fill_(value)
    assert memory.tolist() == [1, 1, 2, 2, 2, 2, 3, 3, 3]


def test_block_has_its_place_and_nothing_has_none():
    local = torch.ones(2, 3)
    shard = BlockPlace((4, 6), (2, 3)).shard(local)
    assert [block.offsets for block in shard.blocks] == [(2, 3)]
    assert shard.blocks[0].tensor.data_ptr() == local.data_ptr()
    assert BlockPlace((4, 6), (4, 0)).shard(torch.ones(0, 6)).blocks == ()


def test_copy_stays_what_it_was():
    local = torch.ones(4, 4).t()[:2]  # not contiguous
    shard = BlockPlace((4, 4), (1, 0)).shard(local)
    copy = shard.copied_to_cpu()
    local.zero_()
    assert copy.whole_shape == (4, 4)
    assert copy.blocks[0].offsets == (1, 0)
    assert copy.blocks[0].tensor.is_contiguous()
    assert torch.equal(copy.blocks[0].tensor, torch.ones(2, 4))
