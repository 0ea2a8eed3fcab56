"""Rows, their order and the choice, on a model of memory and traffic that is known."""

from dataclasses import replace

import pytest

from megablocks_utils.planning.memory import scenario as scenario_module
from megablocks_utils.planning.model.prediction import COMPONENTS, ParallelLayout
from megablocks_utils.planning.speed.layout_plan import PlanRequest, choose_row, plan_layouts
from tests.planning.cases import A100_NODE, PUBLISHED, build_prediction, build_scenario

GB = 10**9


@pytest.fixture
def known(monkeypatch):
    """Hold 160 GB over the ranks, copies whole; gather 100 GB, sharded experts 40, copies 10."""

    def predict(shape, layout, run):
        copies = layout.expert_dp == "replicate"
        held = 160 * GB // (layout.ep_size if copies else run.world_size)
        gathered = 100 if layout.ep_size == 1 else 10 if copies or layout.ep_size == 8 else 40
        sent = {"all_gather": gathered * GB * run.accumulation}
        if copies:
            sent["all_reduce"] = 3 * GB
        return build_prediction(optimizer=held, allocated_bytes=7, sent=sent)

    monkeypatch.setattr(scenario_module, "predict", predict)


def ask(line=PUBLISHED, *, capacity=85 * GB, **options):
    scenario = build_scenario(line, **options)
    return PlanRequest("m", "m", scenario, A100_NODE, capacity)


def rows_of(request):
    return {(row.layout.ep_size, row.layout.expert_dp): row for row in plan_layouts(request)}


def test_rows_are_all_legal_layouts(known):
    rows = rows_of(ask())
    assert list(rows) == [
        (1, "shard"),
        *((2, "shard"), (2, "replicate"), (4, "shard"), (4, "replicate"), (8, "shard")),
    ]


def test_ranks_go_over_what_fits_and_start_at_the_fastest(known):
    rows = rows_of(ask(capacity=45 * GB))
    # 20 GB a rank, and copies 80 and 40; 45 hold 40 with the context, not with a tenth more
    verdicts = {key: row.verdict.name for key, row in rows.items()}
    assert verdicts[2, "replicate"] == "oom"
    assert verdicts[4, "replicate"] == "tight"
    assert set(verdicts.values()) == {"fits", "tight", "oom"}
    ranks = {key: row.rank for key, row in rows.items()}
    # 10 GB: ep 8, the leaner, then the copies; 40 GB; 100 GB
    assert ranks[8, "shard"] == 1
    assert ranks[4, "replicate"] == 2
    assert {ranks[2, "shard"], ranks[4, "shard"]} == {3, 4}
    assert (ranks[1, "shard"], ranks[2, "replicate"]) == (5, None)
    assert rows[8, "shard"].relative_cost == 1
    assert rows[1, "shard"].relative_cost > rows[2, "shard"].relative_cost > 1
    assert rows[2, "replicate"].relative_cost is None
    assert rows[2, "replicate"].remedies and not rows[4, "replicate"].remedies


def test_a_row_that_fits_is_chosen_before_a_faster_one_that_is_tight(known):
    request = replace(ask(capacity=45 * GB), ep_size=4)
    rows = plan_layouts(request)
    chosen = choose_row(rows)
    assert (chosen.layout, chosen.rank) == (ParallelLayout(4, "shard"), 2)
    tight_only = plan_layouts(replace(request, expert_dp="replicate"))
    assert choose_row(tight_only).verdict.name == "tight"
    assert choose_row(plan_layouts(replace(request, capacity_bytes=GB))) is None


def test_only_what_was_asked_for(known):
    def layouts(**asked):
        return [(x.ep_size, x.expert_dp) for x in replace(ask(), **asked).layouts()]

    assert layouts(ep_size=4) == [(4, "shard"), (4, "replicate")]
    assert layouts(ep_size=1) == layouts(ep_size=1, expert_dp="replicate") == [(1, "shard")]
    # One rank holds an expert with ep 8: both words mean the same there.
    assert layouts(expert_dp="replicate") == [(2, "replicate"), (4, "replicate"), (8, "shard")]
    assert layouts(ep_size=8, expert_dp="replicate") == [(8, "shard")]
    assert layouts(ep_size=3) == []


def test_the_record_of_a_row(known):
    row = rows_of(ask())[4, "replicate"]
    record = row.as_record()
    assert list(record["components"]) == list(COMPONENTS)
    assert sum(record["components"].values()) == record["peak_bytes"] == 40 * GB
    assert (record["allocated_bytes"], record["verdict"]) == (7, "fits")
    assert record["reserve_bytes"] == 5.5 * GB
    assert record["cause"] == "optimizer states"
    # 16 micro-steps share what is reduced once
    assert record["sent_bytes_per_micro_step"] == {
        "all_gather": 10 * GB,
        "reduce_scatter": 0,
        "all_to_all": 0,
        "all_reduce": 3 * GB // 16,
    }
    assert record["sent_bytes_per_step_by_link"] == {"intra_node": 163 * GB, "inter_node": 0}
    assert record["launch"].endswith("--ep_size 4 --expert_dp replicate")
    assert "step_s_estimate" not in record
