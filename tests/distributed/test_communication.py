"""Calls and bytes of a step's collectives equal benchmarks/results/step_traffic.md."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain

import pytest

from megablocks_utils.planning.model.prediction import sum_traffic
from megablocks_utils.rehearsal.traffic_counter import sum_groups
from megablocks_utils.training.loop import fit
from megablocks_utils.training.step.objective import label_positions
from tests.support.communication import CommunicationCounter
from tests.support.parity import LAYOUTS, Layout, ParityCase, build_run

NUM_LAYERS, NUM_EXPERTS, HIDDEN, FLOAT_BYTES, COUNT_BYTES = 2, 4, 64, 4, 8
EXPERT_SHARD, REPLICATE = LAYOUTS[2], LAYOUTS[3]
ACCUMULATION = 2
# Exchanges of rows per layer and micro-step: 2 forward, 2 backward, 2 more where recomputed.
ROW_EXCHANGES = {"False": 4, "selective": 4, "True": 6}


@dataclass
class StepRecord:
    """What one rank did in one step.

    Attributes:
        calls: by kind of collective, how many.
        num_bytes: by kind, see `CommunicationCounter`.
        routed: for each layer, and each call of its experts, routed rows by ep rank, and the tokens
            that they are of.
        from_others: of each parameter that FSDP shards, the bytes other ranks of its group hold.
        expert_bytes: bytes of the expert weights this rank holds.
        ep_rank: this rank's place in its ep group.
    """

    calls: dict[str, int]
    num_bytes: dict[str, int]
    routed: dict[str, list[dict[str, list[int]]]] = field(default_factory=dict)
    from_others: dict[str, int] = field(default_factory=dict)
    expert_bytes: int = 0
    ep_rank: int = 0


def run_second_step(rank, argv):
    """Count the collectives of the second step; the first one also sets FSDP up."""
    setup, state = build_run([*argv, "--debug", "False"])
    steps = fit(state, setup)
    next(steps)
    with CommunicationCounter() as counter:
        routed = _record_routing(setup.sharded)
        next(steps)
    weights = setup.sharded.expert_parameters.values()
    return StepRecord(
        dict(counter.calls),
        dict(counter.num_bytes),
        routed,
        _bytes_of_others(state.model, setup.sharded),
        sum(_local_bytes(weight) for weight in weights),
        setup.sharded.mesh.get_local_rank("ep"),
    )


def compare_second_step(rank, argv):
    """Return what the plan says of the second step, and what was sent, by groups of ranks."""
    setup, state = build_run([*argv, "--debug", "False"])
    steps = fit(state, setup)
    next(steps)
    _, plan = next(setup.schedule.plans(1))
    [batch] = plan.micro_batches
    label_tokens = len(label_positions(batch.labels, batch.columns).targets)
    planned = setup.plan.run_plan
    scenario = replace(planned.scenario, tokens=batch.input_ids.numel(), label_tokens=label_tokens)
    with CommunicationCounter() as counter:
        next(steps)
    return scenario.predict(planned.layout).sent, sum_groups(counter.by_group.sent)


def _record_routing(sharded):
    """Note from now on how many rows each call of an experts module has for each ep rank."""
    ep_size = sharded.mesh["ep"].size()
    routed = {name: [] for name in sharded.expert_modules}

    def note(calls):
        def hook(_module, inputs):
            owners = inputs[1] // (NUM_EXPERTS // ep_size)
            rows = owners.flatten().bincount(minlength=ep_size).tolist()
            tokens = [(owners == rank).any(dim=1).sum().item() for rank in range(ep_size)]
            calls.append({"rows": rows, "tokens": tokens})

        return hook

    for name, module in sharded.expert_modules.items():
        module.register_forward_pre_hook(note(routed[name]))
    return routed


def _bytes_of_others(model, sharded):
    num_ranks = {name: sharded.mesh["dp"].size() for name in sharded.expert_parameters}
    if sharded.expert_dp == "replicate":
        num_ranks = dict.fromkeys(num_ranks, 1)
    return {
        name: _local_bytes(parameter) * (num_ranks.get(name, sharded.mesh.size()) - 1)
        for name, parameter in model.named_parameters()
    }


def _local_bytes(parameter):
    local = parameter.to_local()
    return local.numel() * local.element_size()


@pytest.fixture(scope="module")
def count(ranks4, parity_folder) -> Callable[..., list[StepRecord]]:
    """What every rank did in a step of a layout with some options, each run once."""

    @cache
    def run_once(layout: Layout, **options) -> list[StepRecord]:
        case = ParityCase(layout, num_steps=2, **{"accumulation": ACCUMULATION} | options)
        return ranks4.run(run_second_step, parity_folder.argv(case))

    return run_once


@pytest.mark.parametrize(
    ("layout", "checkpointing", "dispatch"),
    [
        (EXPERT_SHARD, "True", "auto"),
        (LAYOUTS[4], "selective", "tokens"),
        (EXPERT_SHARD, "False", "rows"),
    ],
    ids=str,
)
def test_exchange_of_tokens(count, layout, checkpointing, dispatch):
    ep_size = layout.ep_size
    # Defaults are left out, so that the run is the one of the tests below.
    options = {"checkpointing": checkpointing, "token_dispatch": dispatch}
    defaults = {"checkpointing": "True", "token_dispatch": "auto"}
    records = count(layout, **dict(options.items() - defaults.items()))
    what = "rows" if dispatch == "rows" else "tokens"
    for rank, record in enumerate(records):
        group = [r for i, r in enumerate(records) if i // ep_size == rank // ep_size]
        rows, away, returned = (
            sum(
                count_rows(group, record.ep_rank, layer, call)
                for layer in record.routed
                for call in _forward_calls(record, layer, checkpointing)
            )
            for count_rows in (partial(_rows_sent, what=what), _rows_away, _rows_returned)
        )
        moe_calls = NUM_LAYERS * ACCUMULATION
        per_direction = HIDDEN * FLOAT_BYTES
        counts = moe_calls  # also where the layer is recomputed
        assert record.calls["all_to_all of rows"] == ROW_EXCHANGES[checkpointing] * moe_calls
        assert record.calls["all_to_all of counts"] == counts
        # `rows` holds those sent out and those sent back: one exchange of each kind.
        exchanges = ROW_EXCHANGES[checkpointing] // 2
        assert record.num_bytes["all_to_all of rows"] == exchanges * rows * per_direction
        num_counts = NUM_EXPERTS + (ep_size if what == "tokens" else 0)
        foreign_counts = num_counts - num_counts // ep_size
        assert record.num_bytes["all_to_all of counts"] == counts * foreign_counts * COUNT_BYTES
        # Places and weights of rows, once also with recomputing; their weights' gradients.
        routing = away * 2 * FLOAT_BYTES + returned * FLOAT_BYTES if what == "tokens" else 0
        assert record.num_bytes.get("all_to_all of routing", 0) == routing
        assert record.calls.get("all_to_all of routing", 0) == 2 * moe_calls * bool(routing)


def _forward_calls(record, layer, checkpointing):
    """Return the places of a layer's forward calls; check that recomputing repeats them."""
    calls = record.routed[layer]
    if checkpointing == "False":
        return range(len(calls))
    assert calls[::2] == calls[1::2]
    return range(0, len(calls), 2)


def _rows_sent(group, ep_rank, layer, call, what):
    """Rows that leave a rank: its own to other ranks, and other ranks' results back to them."""
    away = _rows_away(group, ep_rank, layer, call, what)
    return away + _rows_returned(group, ep_rank, layer, call, what)


def _rows_away(group, ep_rank, layer, call, what="rows"):
    own = group[ep_rank].routed[layer][call][what]
    return sum(own) - own[ep_rank]


def _rows_returned(group, ep_rank, layer, call, what="rows"):
    others = (r for r in group if r.ep_rank != ep_rank)
    return sum(r.routed[layer][call][what][ep_rank] for r in others)


def test_without_expert_parallelism_no_token_travels(count):
    for record in count(Layout(4, 1), accumulation=1):
        assert not [kind for kind in record.calls if kind.startswith("all_to_all")]


@pytest.mark.parametrize(
    ("layout", "options"),
    [(EXPERT_SHARD, {}), (EXPERT_SHARD, {"sync_each_batch": False}), (REPLICATE, {})],
)
def test_fsdp_collectives(count, layout, options):
    records = count(layout, **options)
    # Embedding, decoder layers, and norm with output head; experts sharded over dp by themselves.
    num_units = 1 + NUM_LAYERS + 1 + (NUM_LAYERS if layout.expert_dp == "shard" else 0)
    reductions = 1 if options else ACCUMULATION
    for record in records:
        from_others = sum(record.from_others.values())
        assert record.calls["reduce_scatter"] == reductions * num_units
        assert record.num_bytes["reduce_scatter"] == reductions * from_others
        # Forward and backward; but the last unit of forward is the first of backward, and stays,
        # and the embedding's gradient does not need its weights.
        last = record.from_others["model.norm.weight"] + record.from_others["lm_head.weight"]
        once = last + record.from_others["model.embed_tokens.weight"]
        assert record.calls["all_gather"] == ACCUMULATION * (2 * num_units - 2)
        assert record.num_bytes["all_gather"] == ACCUMULATION * (2 * from_others - once)


def test_replicas_are_summed_once_a_step(count):
    for without, record in zip(count(EXPERT_SHARD), count(REPLICATE), strict=True):
        assert record.calls["all_reduce"] - without.calls["all_reduce"] == 2 * NUM_LAYERS
        more = record.num_bytes["all_reduce"] - without.num_bytes["all_reduce"]
        assert more == record.expert_bytes


@pytest.mark.parametrize(
    ("layout", "options", "over"),
    [
        (Layout(4, 2, tp_size=2), {"lora": "none"}, "all_gather reduce_scatter all_reduce"),
        (
            Layout(4, 1, expert_tp_size=2),
            {"lora": "mlp-only", "lora_rank": 16},
            "all_to_all all_reduce",
        ),
        (Layout(4, 1, sp_size=2), {"checkpointing": "False"}, "all_to_all"),
    ],
    ids=str,
)
def test_further_axes_send_what_is_planned(ranks4, parity_folder, layout, options, over):
    """Over all groups but the world, where metrics are reduced, and ep, where routing decides.

    Both ranks of a group together: slices of experts send each other rows of both.
    """
    case = ParityCase(layout, num_steps=2, **options)
    of_ranks = ranks4.run(compare_second_step, parity_folder.argv(case))[:2]
    told, counted = (sum_traffic(chain(*parts)) for parts in zip(*of_ranks, strict=True))
    by_routing = ("all_to_all", layout.ep_size, layout.expert_tp_size)
    left_out = {("all_reduce", 4, 1), by_routing if layout.ep_size > 1 else None}
    assert [p for p in counted if p[:3] not in left_out] == [
        p for p in told if p[:3] not in left_out
    ]
    kinds = {part.kind for part in counted if (part.size, part.stride) == (2, 1)}
    assert kinds >= set(over.split())
