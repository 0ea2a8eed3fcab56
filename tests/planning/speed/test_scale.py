"""From where on tokens between nodes are waited for, on traffic that is known."""

import pytest

from megablocks_utils.planning.memory import scenario as scenario_module
from megablocks_utils.planning.speed.layout_plan import PlanRequest
from megablocks_utils.planning.speed.scale import describe_dominance, plan_scale, waits_for_tokens
from tests.planning.cases import A100_NODE, PUBLISHED, build_prediction, build_scenario

GB = 10**9


def ask(monkeypatch, *, weights, tokens, model="qwen3-30b-a3b", capacity=85 * GB, **asked):
    """A run that sends so many GB a step: weights over all ranks, tokens over its ep group.

    It takes 800 GB over the ranks, copies whole.
    """

    def predict(shape, layout, run):
        ranks = layout.ep_size if layout.expert_dp == "replicate" else run.world_size
        sent = {"all_gather": weights * GB}
        sent["all_to_all"] = (tokens if layout.ep_size > 1 else 0) * GB
        groups = {"all_gather": (run.world_size, 1), "all_to_all": (layout.ep_size, 1)}
        return build_prediction(optimizer=800 * GB // ranks, sent=sent, groups=groups)

    monkeypatch.setattr(scenario_module, "predict", predict)
    scenario = build_scenario(PUBLISHED, model=model)
    return PlanRequest("m", "m", scenario, A100_NODE, capacity, **asked)


def dominance(request, worlds=(8, 16, 32, 64)):
    return describe_dominance(plan_scale(request, worlds))


def test_tokens_that_take_longer_than_weights(monkeypatch):
    """A100: a rank's adapter has 25 GB/s, and all 8 of a node share the weights of a ring.

    16 GPUs, ep 16: 8 of 15 parts leave the node, t * 8/15 / 25 s against w / 200 s.
    """
    assert 3 * 8 / 15 / 25 > 10 / 200 > 2 * 8 / 15 / 25
    more = ask(monkeypatch, weights=10, tokens=3)
    assert dominance(more).startswith(
        "With the largest ep_size, all-to-all between nodes takes longer than gathering and "
        "reducing weights from 16 GPUs on (ep_size 16); "
    )
    # 32 GPUs: 24 of 31 parts
    assert 2 * 24 / 31 / 25 > 10 / 200
    less = ask(monkeypatch, weights=10, tokens=2)
    assert "from 32 GPUs on (ep_size 32)" in dominance(less)
    points = plan_scale(less, (8, 16, 32))
    assert [waits_for_tokens(point.widest) for point in points] == [False, False, True]


def test_within_a_node_nobody_waits_for_another(monkeypatch):
    """However long tokens take: the fast link is not what is asked about."""
    request = ask(monkeypatch, weights=0.001, tokens=100, model="mixtral-8x7b")
    points = plan_scale(request, (8, 16, 32))
    assert not any(waits_for_tokens(point.widest) for point in points)
    assert describe_dominance(points) == (
        "No ep_size that divides experts and GPUs is larger than a node: tokens never leave it."
    )


def test_tokens_that_never_take_longer(monkeypatch):
    assert dominance(ask(monkeypatch, weights=100, tokens=1)) == (
        "With the largest ep_size, tokens leave the node from 16 GPUs on (ep_size 16), but up to "
        "64 GPUs all-to-all between nodes never takes longer than gathering and reducing weights."
    )


def test_whether_a_chosen_layout_waits_is_said(monkeypatch):
    free = ask(monkeypatch, weights=10, tokens=3)
    assert dominance(free).endswith("; the chosen layouts never wait for it that long.")
    wide = ask(monkeypatch, weights=10, tokens=3, ep_size=32)
    assert dominance(wide).endswith("; a chosen layout does from 32 GPUs on.")


def test_a_point_is_the_plan_for_so_many_gpus(monkeypatch):
    request = ask(monkeypatch, weights=10, tokens=3, capacity=60 * GB)
    points = plan_scale(request, (8, 16, 32))
    assert [point.world_size for point in points] == [8, 16, 32]
    # 100 GB a rank, 50 which is tight with 5 + 1.5 GB of reserve, 25
    assert points[0].chosen is None
    assert points[0].shown is points[0].leanest
    assert [point.chosen.verdict.name for point in points[1:]] == ["fits", "fits"]
    assert points[2].widest.layout.ep_size == 32
    assert not any(point.leanest.remedies for point in points)  # a line has no room for them
    record = points[0].as_record()
    assert (record["gpus"], record["chosen"], record["tokens_wait_longest"]) == (8, None, False)
    assert record["leanest"]["peak_bytes"] == 100 * GB


@pytest.mark.parametrize(("ep_size", "worlds"), [(64, [64]), (16, [16, 32, 64])])
def test_only_numbers_of_gpus_that_the_ep_size_divides(monkeypatch, ep_size, worlds):
    request = ask(monkeypatch, weights=1, tokens=1, ep_size=ep_size)
    points = plan_scale(request, (8, 16, 32, 64))
    assert [point.world_size for point in points] == worlds
