"""Which rank gets which experts: as many each, evener than in their order, never worse."""

import random

from megablocks_utils.config.expert_balance import MeasuredLoads, assign_balanced


def test_busy_experts_are_spread_and_no_placement_is_worse_than_the_order():
    assert assign_balanced([4, 4, 1, 1], 2) == (0, 2, 1, 3)
    assert assign_balanced([4, 1, 1, 4], 2) == (0, 1, 2, 3)  # as even as it can be
    draw = random.Random(0)
    for num_ranks in (1, 2, 4, 8):
        loads = [draw.paretovariate(1.0) for _ in range(16)]
        placed = assign_balanced(loads, num_ranks)
        room = 16 // num_ranks
        sums = [sum(loads[e] for e in placed[n : n + room]) for n in range(0, 16, room)]
        in_order = [sum(loads[n : n + room]) for n in range(0, 16, room)]
        assert sorted(placed) == list(range(16))
        assert max(sums) <= max(in_order)
        # No rank is above the fair share by more than one expert's load.
        assert max(sums) <= max(sum(loads) / num_ranks + max(loads), max(loads))


def test_a_step_counts_by_its_rows_and_shares_are_those_of_the_busiest_rank_of_each_step():
    lines = [("a", 100, (0.5, 0.5, 0.0, 0.0)), ("a", 10, (0.0, 0.0, 0.5, 0.5))]
    found = MeasuredLoads.collect("file", lines).balance("a", 2)
    assert found.placed == (0, 2, 1, 3)
    assert (found.before, found.after) == (1.0, 0.5)
