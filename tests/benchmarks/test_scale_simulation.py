"""What a rank of 64 really sends, by link, is what the plan says."""

import pytest
from transformers import MixtralConfig

from benchmarks.scale_simulation import Case, compare
from megablocks_utils.planning.model.prediction import ParallelLayout
from tests.rehearsal.lone import _without_group
from tests.rehearsal.test_rehearse import SIZES


def compare_alone(pool_rank: int, case: Case, rank: int):
    """Compare in a process that has a group of its own."""
    with _without_group():
        return compare(case, rank)


@pytest.mark.parametrize(
    ("layout", "groups", "rank"),
    [(ParallelLayout(8, "replicate"), 4, 35), (ParallelLayout(16, "shard"), 1, 63)],
    ids=str,
)
def test_plan_and_simulation_agree_to_the_byte(ranks1, tmp_path, layout, groups, rank):
    """A group of 16 ranks on two nodes with copies of experts in both; an ep group on two nodes."""
    sizes = {"num_local_experts": 16, "num_hidden_layers": 5}
    MixtralConfig(**SIZES | sizes).save_pretrained(tmp_path)
    [found] = ranks1.run(compare_alone, Case(str(tmp_path), 64, layout, groups), rank)
    assert dict(found.played) == dict(found.planned)
    assert all(num_bytes > 0 for num_bytes in found.planned.values() if groups == 1)
