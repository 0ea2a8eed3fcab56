"""What the reshard benchmark covers, shows and complains about."""

from io import StringIO

import pytest
from rich.console import Console

from benchmarks.reshard import RUNS, STATES, build_tables, describe, find_violations
from tests.support.parity import LAYOUTS

ROW = {f"{kind}_error": 0.0 for kind in STATES} | {
    "saved_at": "fsdp2 1 rank unsharded",
    "loaded_at": "fsdp1 2 ranks ep2 replicate",
    "loss": 2e-7,
    "grad_norm": 9e-6,
}
SAME = ROW | {"loaded_at": ROW["saved_at"], "loss": 0.0, "grad_norm": 0.0}


def test_every_promised_layout_is_there():
    assert [run.layout for run in RUNS if run.script == "fsdp2"] == list(LAYOUTS)
    assert {describe(run) for run in RUNS} > {ROW["saved_at"], ROW["loaded_at"]}
    assert len({describe(run) for run in RUNS}) == 7


def test_tables_show_every_pair():
    output = StringIO()
    for table in build_tables([SAME, ROW]):
        Console(file=output, width=140).print(table)
    assert "2.0e-07" in output.getvalue()
    assert output.getvalue().count("fsdp1 2 ranks ep2 replicate") == 2


@pytest.mark.parametrize("name", [f"{kind}_error" for kind in STATES])
def test_state_must_be_exact(name):
    assert find_violations([ROW, SAME]) == []
    assert len(find_violations([ROW | {name: 1e-9}])) == 1


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_next_steps_must_be_equal_or_in_another_layout_near(name):
    assert len(find_violations([ROW | {name: 1.1e-5}])) == 1
    assert len(find_violations([SAME | {name: 1e-9}])) == 1
