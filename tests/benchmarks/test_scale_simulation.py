"""What ranks of 64 really send, by link, is what the plan says, and they lie as declared."""

from dataclasses import replace

import pytest
from transformers import MixtralConfig

from benchmarks.scale_placement import check_all, hold
from benchmarks.scale_ranks import Case, compare
from megablocks_utils.errors import PlacementError
from megablocks_utils.planning.model.prediction import ParallelLayout
from tests.rehearsal.lone import _without_group
from tests.rehearsal.test_rehearse import SIZES


@pytest.fixture
def model(tmp_path):
    sizes = {"num_local_experts": 16, "num_hidden_layers": 5}
    MixtralConfig(**SIZES | sizes).save_pretrained(tmp_path)
    return str(tmp_path)


def compare_alone(pool_rank: int, case: Case, rank: int):
    """Compare in a process that has a group of its own."""
    with _without_group():
        return compare(case, rank)


def hold_alone(pool_rank: int, case: Case):
    """Wrap every rank in a process that has a group of its own."""
    with _without_group():
        return [hold(case, rank) for rank in range(case.world_size)]


@pytest.mark.parametrize(
    ("layout", "groups", "rank"),
    [(ParallelLayout(8, "replicate"), 4, 35), (ParallelLayout(16, "shard"), 1, 63)],
    ids=str,
)
def test_plan_and_simulation_agree_to_the_byte(ranks1, model, layout, groups, rank):
    """A group of 16 ranks on two nodes with copies of experts in both; an ep group on two nodes.

    Rows do not divide by ep_size, and the last rank of a group keeps fewer than the first.
    """
    case = Case(model, 64, layout, groups, tokens=1001)
    [found] = ranks1.run(compare_alone, case, rank)
    assert dict(found.played) == dict(found.told_apart)
    assert found.find_rounding() > 0
    assert all(num_bytes > 0 for num_bytes in found.planned.values() if groups == 1)


def test_all_ranks_lie_as_the_plan_declares(ranks1, model):
    """Every axis of the experts' mesh; what a rank lacks is found."""
    case = Case(model, 16, ParallelLayout(2, "shard"), num_groups=2, expert_tp_size=2)
    [held] = ranks1.run(hold_alone, case)
    check_all(held)
    counts = [held[5].counts[0] - 1, *held[5].counts[1:]]
    with pytest.raises(PlacementError, match=r"hold .* elements of model.embed_tokens.weight"):
        check_all([*held[:5], replace(held[5], counts=counts), *held[6:]])
