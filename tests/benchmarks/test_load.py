"""The benchmark of loading: a row says what was within its bound, and what failed."""

from benchmarks.load.__main__ import build_row, format_table
from benchmarks.load.contenders import CONTENDERS, OURS


def rank(peak, own=100, bare=40):
    return {"peak_bytes": peak, "bare_bytes": bare, "own_bytes": own, "seconds": peak / 100}


def test_a_row_says_whether_every_rank_of_every_load_is_within_its_bound():
    # 1.25 x 100 + 10 + 40 = 175; the rank with the smaller part has 1.25 x 80 + 10 + 40 = 150.
    loads = [[rank(175), rank(150, own=80)], [rank(160), rank(120, own=80)]]
    row = build_row(2, OURS[0], loads, 10)
    assert row["is_within_bound"]
    assert row["bound_bytes"] == {"n": 2, "median": 175, "min": 175, "max": 175}
    assert row["peak_bytes"] == {"n": 2, "median": 167.5, "min": 160, "max": 175}
    assert row["seconds"]["max"] == 1.75 and row["own_bytes"]["median"] == 100
    loads[1][1]["peak_bytes"] = 151
    assert not build_row(2, OURS[0], loads, 10)["is_within_bound"]


def test_a_contender_that_fails_is_a_result():
    row = build_row(4, CONTENDERS[-1], [[rank(1)] * 4, "ValueError: no"], 10)
    assert row == {
        "world_size": 4,
        "side": CONTENDERS[-1],
        "error": "ValueError: no",
        "failed": "1 of 2",
    }
    text = format_table([row, build_row(1, OURS[1], [[rank(1)]], 10)])
    assert "failed: ValueError: no" in text and "yes" in text
