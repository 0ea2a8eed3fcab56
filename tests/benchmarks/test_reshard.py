"""What the reshard benchmark covers, shows and complains about."""

import pytest

from benchmarks.reshard import ERRORS, RUNS, find_violations, format_table
from tests.support.parity import LAYOUTS

ROW = dict.fromkeys(ERRORS, 0.0) | {
    "saved": "2 ep2",
    "resumed": "FSDP1 4 ep2",
    "loss": 2e-7,
    "grad_norm": 9e-6,
}
SAME = ROW | {"resumed": ROW["saved"], "loss": 0.0, "grad_norm": 0.0}


def test_every_promised_layout_is_there():
    layouts = [run.layout for run in RUNS.values() if run.script == "fsdp2"]
    assert [str(layout) for layout in layouts[1:]] == [str(layout) for layout in LAYOUTS[1:]]
    assert layouts[0].world_size == 1


def test_table_shows_every_pair():
    rows = [
        ROW | {"saved": source, "resumed": target} | ({"loss": 0.0} if source == target else {})
        for source in RUNS
        for target in RUNS
    ]
    text = format_table(rows)
    assert text.count("2.0e-07") == len(RUNS) * (len(RUNS) - 1)
    assert f"all {len(RUNS) ** 2} pairs: weights 0, exp_avg 0, exp_avg_sq 0." in text


@pytest.mark.parametrize("name", ERRORS)
def test_state_must_be_exact(name):
    assert find_violations([ROW, SAME]) == []
    assert len(find_violations([ROW | {name: 1e-9}])) == 1


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_next_steps_must_be_equal_or_in_another_layout_near(name):
    assert len(find_violations([ROW | {name: 1.1e-5}])) == 1
    assert len(find_violations([SAME | {name: 1e-9}])) == 1
