"""All ranks raise what one met, return what one decided, and know each other's numbers."""

import pytest
import torch.distributed as dist

from megablocks_utils.errors import ConfigurationError, DataError
from megablocks_utils.processes.agreement import (
    broadcast_from_rank0,
    gather_from_all_ranks,
    max_over_ranks,
    min_over_ranks,
    raise_on_all_ranks,
    sum_over_ranks,
)

AGREE = (raise_on_all_ranks, gather_from_all_ranks, broadcast_from_rank0)


def _refuse():
    raise DataError("mine")


def test_without_a_process_group_a_rank_agrees_with_itself():
    for agree in AGREE:
        with pytest.raises(DataError, match="^mine$"):
            agree(_refuse)
    assert raise_on_all_ranks(lambda: "mine") == broadcast_from_rank0(lambda: "mine") == "mine"
    assert gather_from_all_ranks(lambda: "mine") == ["mine"]
    assert max_over_ranks(7) == min_over_ranks(7) == sum_over_ranks(7) == 7


def _agree(rank):
    return (
        raise_on_all_ranks(lambda: rank),
        gather_from_all_ranks(lambda: rank),
        broadcast_from_rank0(lambda: rank if rank == 0 else pytest.fail()),
        max_over_ranks(10 + rank),
        min_over_ranks(10 + rank),
        sum_over_ranks(10 + rank),
    )


def test_every_rank_gets_the_same_answer(ranks4):
    wanted = [(rank, [0, 1, 2, 3], 0, 13, 10, 46) for rank in range(4)]
    assert ranks4.run(_agree) == wanted


def _meet_errors(rank):
    def fail_on(*ranks):
        def action():
            if rank in ranks:
                raise ConfigurationError(f"ep_size of rank {rank}", parameters=("ep_size",))

        return action

    caught = []
    for agree, action in zip(AGREE, (fail_on(2, 1), fail_on(3), fail_on(0)), strict=True):
        with pytest.raises(ConfigurationError) as error:
            agree(action)
        caught.append(error.value.as_options())
    return caught


def test_the_lowest_failing_rank_is_heard_by_all(ranks4):
    """Also what makes its sentence one about options survives the way."""
    assert ranks4.run(_meet_errors) == [[f"--ep_size of rank {rank}" for rank in (1, 3, 0)]] * 4


def _agree_in_groups(rank):
    groups = [dist.new_group(ranks, backend="gloo") for ranks in ([0, 1], [2, 3])]
    mine = groups[rank // 2]
    return (
        gather_from_all_ranks(lambda: rank, mine),
        broadcast_from_rank0(lambda: rank, mine),
        max_over_ranks(rank, mine),
    )


def test_a_group_agrees_by_itself(ranks4):
    """Its first rank is not the world's."""
    assert ranks4.run(_agree_in_groups) == [([0, 1], 0, 1)] * 2 + [([2, 3], 2, 3)] * 2
