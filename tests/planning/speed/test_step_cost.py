"""The order of speed, against the published table, and the operations, against torch's count."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.prediction import GroupTraffic, ParallelLayout
from megablocks_utils.planning.speed.calibration import Calibration
from megablocks_utils.planning.speed.step_cost import cost_step, count_flops, rank_costs
from megablocks_utils.planning.speed.traffic_links import Cluster
from tests.planning.cases import A100_NODE, PUBLISHED, build_prediction, build_scenario
from tests.support.tiny_models import build_tiny_model

GB = 10**9
NONE, EP8, EP4 = (
    ParallelLayout(1, "shard"),
    ParallelLayout(8, "shard"),
    ParallelLayout(4, "replicate"),
)
# Mixtral-8x7B on 8 A100, runtimes of the published table; GB received a micro-step as counted on
# paper for 256 tokens: all-gather, reduce-scatter, all-to-all.
PUBLISHED_ROWS = [
    ("none", NONE, 3037, (163.5, 81.7, 0)),
    ("attn-only", NONE, 2137, (163.5, 0, 0)),
    ("none", EP8, 871, (5.6, 2.8, 0.7)),
    ("attn-only", EP8, 878, (5.6, 0, 0.7)),
    ("attn-only", EP4, 878, (5.6, 0, 0.6)),
]


def scenario_of(use_lora, line=PUBLISHED, **options):
    return build_scenario(f"{line} --use_lora {use_lora}", **options)


def sent(gathered, scattered=0, tokens=0, accumulation=16):
    amounts = {"all_gather": gathered, "reduce_scatter": scattered, "all_to_all": tokens}
    whole = {name: round(amount * GB * accumulation) for name, amount in amounts.items()}
    return build_prediction(parameters=1, sent=whole)


@pytest.mark.parametrize("tokens", [210, 256])
def test_the_published_rows_come_in_their_order(tokens):
    """Of rows whose times differ by more than the table repeats itself (6 %), which is faster."""
    costs = []
    for use_lora, layout, seconds, amounts in PUBLISHED_ROWS:
        scenario = replace(scenario_of(use_lora), tokens=tokens)
        cost = cost_step(scenario, layout, sent(*amounts), A100_NODE)
        costs.append((seconds, cost.micro_step))
        assert cost.regime == ("all-gather bound" if layout == NONE else "launch bound")
    pairs = [(a, b) for a, b in combinations(costs, 2) if abs(a[0] - b[0]) > 0.06 * max(a[0], b[0])]
    assert len(pairs) == 7
    for (seconds, cost), (other_seconds, other_cost) in pairs:
        assert (seconds > other_seconds) == (cost > other_cost)


def test_regimes():
    """8 A100: 0.54 s of launches, 231 GB/s, 125 TFLOP/s."""

    def regime(layout, prediction, **changes):
        return cost_step(
            replace(scenario_of("none"), **changes), layout, prediction, A100_NODE
        ).regime

    assert regime(EP8, sent(6)) == "launch bound"
    assert regime(NONE, sent(160)) == "all-gather bound"
    assert regime(EP8, sent(6, tokens=160)) == "all-to-all bound"
    # 12.7 B x 8 x 4096 operations: 3.3 s; gathered in 0.7 s meanwhile
    assert regime(NONE, sent(160), tokens=4096) == "compute bound"


def test_copies_that_are_reduced_are_told_from_weights_that_are_gathered():
    """20 GB a step over 2 nodes at 25 GB/s, in steps of one micro-step: 1 s."""
    line = PUBLISHED.replace("steps 16", "steps 1")
    scenario = scenario_of("none", line, world_size=16)
    layout, amounts = ParallelLayout(8, "replicate"), {"all_gather": 10 * GB, "all_reduce": 20 * GB}
    groups = {"all_gather": (16, 1), "all_reduce": (2, 8)}
    prediction = build_prediction(parameters=1, sent=amounts, groups=groups)
    cost = cost_step(scenario, layout, prediction, A100_NODE)
    assert cost.regime == "all-reduce bound"
    assert cost.terms["weights"] == pytest.approx((10 / 200 + 20 / 25) / 0.77)
    inside = cost_step(scenario, layout, prediction, Cluster(A100_NODE.gpu, 16))
    assert inside.regime == "launch bound"


def test_weights_hide_behind_compute_and_tokens_do_not():
    scenario = replace(scenario_of("none"), tokens=8192)
    compute = cost_step(scenario, NONE, sent(0), A100_NODE).terms["compute"]
    assert cost_step(scenario, NONE, sent(160), A100_NODE).micro_step == pytest.approx(compute)
    waits = cost_step(scenario, NONE, sent(0, tokens=160), A100_NODE).micro_step - compute
    assert waits == pytest.approx(160 / (300 * 0.77))


def test_the_busiest_rank_holds_the_others_up():
    scenario = scenario_of("none")
    even = replace(scenario, imbalance=1.0)
    assert count_flops(scenario, NONE) == count_flops(even, NONE) == count_flops(even, EP8)
    experts = 2 / 8 * scenario.shape.num_expert_parameters
    more = count_flops(scenario, EP8) - count_flops(scenario, NONE)
    assert more == pytest.approx(4 * 256 * 2 * experts * 0.25)  # forward, again, and twice back


def count_by_torch(model, tokens):
    """The products of a forward and backward pass, apart from those of the attention's scores."""
    model.set_experts_implementation("eager")  # a grouped product is not counted
    model.train()
    inputs = torch.randint(0, 128, (1, tokens))
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=inputs, labels=inputs)
        output.loss.backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    return sum(n for op, n in counts.items() if "bmm" not in op and "attention" not in op)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_operations_are_those_that_torch_counts(family):
    """All weights trained, nothing recomputed: every product but the scores', which see half."""
    model = build_tiny_model(family, attn_implementation="eager")
    tokens = 64
    line = f"{PUBLISHED} --gradient_checkpointing False --max_seq_length {tokens}"
    shape = ModelShape.from_config(model.config.to_dict())
    scenario = replace(build_scenario(line), shape=shape, tokens=tokens)
    attention = shape.attention
    scores = 2 * tokens * tokens * attention.num_heads * attention.head_dim * shape.num_layers
    assert count_flops(scenario, NONE) - 3 * scores == pytest.approx(
        count_by_torch(model, tokens),
        rel=0.01,  # norms are no products, and are counted here
    )


def test_frozen_weights_and_recomputing():
    full, lora = scenario_of("none"), scenario_of("attn-only")
    kept = scenario_of("none", f"{PUBLISHED} --gradient_checkpointing False")
    forward = count_flops(full, NONE) / 4
    assert count_flops(kept, NONE) == pytest.approx(3 * forward)
    assert count_flops(lora, NONE) == pytest.approx(3 * forward)


def test_what_cannot_be_told_apart_goes_by_memory():
    a, b, c, d = (ParallelLayout(n, "shard") for n in (1, 2, 4, 8))
    costs = {a: 1.0, b: 1.04, c: 1.08, d: 2.0}
    # 1.04 is within 5 % of 1.0; 1.08 is not, though it is of 1.04
    assert rank_costs(costs, {a: 9, b: 5, c: 1, d: 1}) == [b, a, c, d]
    assert rank_costs(costs, {a: 5, b: 9, c: 1, d: 1}) == [a, b, c, d]
    assert rank_costs({}, {}) == []


def test_experts_sharded_over_dp_are_told_from_all_else():
    """8 nodes: of 46 GB 6 go over all ranks, and those of sharded experts over dp alone."""
    scenario = scenario_of("none", world_size=64)
    gpu = A100_NODE.gpu
    over = [("all_gather", 64, 1, 16 * 6 * GB), ("all_gather", 8, 8, 16 * 40 * GB)]
    prediction = replace(build_prediction(parameters=1), sent=tuple(GroupTraffic(*o) for o in over))
    links = cost_step(scenario, EP8, prediction, A100_NODE).links["all_gather"]
    # over all: 8 rings share 8 adapters; over dp each rank has its adapter for itself
    assert links.inter_bytes == pytest.approx(16 * GB * (6 / 8 + 40))
    assert links.intra_bytes == pytest.approx(16 * GB * 6 * 7 / 8)
    seconds = 6 / min(300, 8 * 25) + 40 / 25
    assert links.ideal_s == pytest.approx(16 * seconds)
    assert gpu.inter_bytes_per_s == 25e9


def test_copies_are_reduced_over_dp():
    groups = {"all_reduce": (2, 8)}
    reduced = build_prediction(parameters=1, sent={"all_reduce": 32 * GB}, groups=groups)
    scenario = scenario_of("none", world_size=16)
    links = cost_step(scenario, ParallelLayout(8, "replicate"), reduced, A100_NODE).links[
        "all_reduce"
    ]
    assert (links.intra_bytes, links.inter_bytes) == (0, 32 * GB)
    inside = cost_step(
        scenario, ParallelLayout(8, "replicate"), reduced, Cluster(A100_NODE.gpu, 16)
    )
    assert inside.links["all_reduce"].inter_bytes == 0


def test_with_a_calibration_time_is_what_was_measured():
    calibration = Calibration(bytes_per_s=1e11, overhead_s=0.5, workload={})
    scenario = scenario_of("none")
    cost = cost_step(scenario, EP8, sent(50, tokens=100), A100_NODE, calibration)
    assert cost.step_s == pytest.approx(16 * (0.5 + 1.5))
    assert cost.micro_step == pytest.approx(2.0)
    assert cost.terms == pytest.approx({"launch": 0.5, "weights": 0.5, "tokens": 1.0})
    assert cost.regime == "all-to-all bound"
