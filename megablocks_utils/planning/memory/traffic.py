"""Bytes that leave a rank in one optimizer step, by kind of collective and by group.

Counted as in benchmarks/results/step_traffic.md. Reductions of metrics, a few dozen bytes a step,
are left out.
"""

from collections.abc import Iterable, Iterator

from megablocks_utils.config.dispatch_cost import ROUTING_BYTES, WEIGHT_GRADIENT_BYTES
from megablocks_utils.planning.memory.dense_stages import exchanged_bytes, output_bytes
from megablocks_utils.planning.memory.fsdp_units import FsdpUnit, ModelUnits
from megablocks_utils.planning.memory.sizes import INDEX, Sizes
from megablocks_utils.planning.memory.tp_traffic import Axis, count_tp_traffic
from megablocks_utils.planning.model.prediction import GroupTraffic, sum_traffic

__all__ = ["count_traffic", "sum_of_slices"]

_NORM_BYTES = 8


class _Axes:
    """The groups that a rank is in, on both meshes; the last axis of each is innermost."""

    def __init__(self, sizes: Sizes) -> None:
        run, ep_size = sizes.run, sizes.layout.ep_size
        self.world = Axis(run.world_size, 1)
        self.groups = Axis(run.dp_replicate_size, run.shard_size)
        self.shard = Axis(run.dense_shard_size, run.tp_size)
        self.copies = Axis(run.count_copies(sizes.layout), ep_size * run.expert_tp_size)
        self.ep = Axis(ep_size, run.expert_tp_size)
        self.slices = Axis(run.expert_tp_size, 1)
        self.rows = Axis(run.sp_size, run.tp_size)
        self.tp = Axis(run.tp_size, 1)


def count_traffic(sizes: Sizes, units: ModelUnits) -> tuple[GroupTraffic, ...]:
    """Return what the first rank sends."""
    axes = _Axes(sizes)
    return sum_traffic(
        [
            *_count_gathered(sizes, units, axes),
            *_count_exchanges(sizes, axes),
            *_count_head_exchanges(sizes, axes),
            *count_tp_traffic(sizes, axes.tp),
            *_count_all_reduces(sizes, units, axes),
        ]
    )


def sum_of_slices(sizes: Sizes, units: ModelUnits) -> int:
    """Return the bytes of gradients that are summed over the slices of experts.

    They are of what those ranks hold alike: factors of adapters that see no slice.
    """
    if sizes.run.expert_tp_size == 1:
        return 0
    experts = (layer.experts for layer in units.layers if layer.experts is not None)
    shards = (s for unit in experts for s in unit.shards if s.is_trained and s.num_slices == 1)
    return sum(shard.numel * shard.stored for shard in shards)


def _count_gathered(sizes: Sizes, units: ModelUnits, axes: _Axes) -> Iterator[GroupTraffic]:
    """Gather every unit's weights, and reduce its gradients.

    The last unit of forward is the first of backward, and stays; the embedding's gradient does not
    need its weights.
    """
    run = sizes.run
    num_reductions = run.accumulation if run.sync_each_batch else 1
    once = {id(unit) for unit in (units.embedding, units.tail)}
    experts = {id(layer.experts) for layer in units.layers}
    for unit in units.all():
        axis = axes.copies if id(unit) in experts else axes.shard
        num_gathers = run.accumulation * (1 if id(unit) in once else 2)
        yield axis.send("all_gather", num_gathers * _missing(unit, unit.gathered_bytes))
        yield axis.send("reduce_scatter", num_reductions * _missing(unit, unit.reduced_bytes))


def _missing(unit: FsdpUnit, whole_bytes: int) -> int:
    """Return what a rank lacks of a whole."""
    return whole_bytes // unit.ranks * (unit.ranks - 1)


def _count_exchanges(sizes: Sizes, axes: _Axes) -> Iterator[GroupTraffic]:
    """Exchange counts, and rows out and back, in the layers of one micro-step."""
    run, ep_size = sizes.run, axes.ep.size
    if not sizes.rows_travel:
        return
    num_layers = sizes.shape.num_moe_layers
    num_out = num_layers * (3 if run.gradient_checkpointing == "full" else 2)
    num_back = num_out - sizes.first_experts_send_nothing_back
    row = sizes.shape.hidden_size * sizes.compute
    away, returned = _leaving(sizes.num_sent, ep_size), _leaving(sizes.num_came, ep_size)
    num_counts = sizes.shape.num_experts + ep_size * sizes.sends_tokens
    counts = num_layers * num_counts * INDEX * (ep_size - 1) // ep_size
    sent = (num_out * away + num_back * returned) * row + counts
    if sizes.sends_tokens:
        routing = _leaving(sizes.num_routed, ep_size) * ROUTING_BYTES
        weights = _leaving(sizes.num_received, ep_size) * WEIGHT_GRADIENT_BYTES
        sent += num_layers * (routing + weights)
        sent -= weights * sizes.first_experts_send_nothing_back
    yield axes.ep.send("all_to_all", run.accumulation * sent)
    # Each slice gets the rows and counts of the others, and gives back its part of their sums.
    to_slices = (num_out + num_back) * sizes.num_brought * row
    to_slices += num_layers * sizes.shape.num_experts * INDEX
    others = axes.slices.size - 1
    yield axes.slices.send("all_to_all", run.accumulation * others * to_slices)


def _count_head_exchanges(sizes: Sizes, axes: _Axes) -> Iterator[GroupTraffic]:
    """Exchange tokens for heads and back, around the attention of every layer."""
    sp_size, run = sizes.run.sp_size, sizes.run
    if sp_size == 1:
        return
    num_passes = (3 if run.gradient_checkpointing == "full" else 2) * len(sizes.shape.layers)
    num_passes -= sizes.first_experts_send_nothing_back
    one_pass = exchanged_bytes(sizes) + output_bytes(sizes)
    sent = num_passes * one_pass // sp_size * (sp_size - 1)
    yield axes.rows.send("all_to_all", run.accumulation * sent)


def _leaving(num_rows: int, ep_size: int) -> int:
    """Return the rows that the first rank of an ep group has not with itself."""
    return num_rows - -(-num_rows // ep_size)


def _count_all_reduces(sizes: Sizes, units: ModelUnits, axes: _Axes) -> Iterator[GroupTraffic]:
    """Reduce the norm over the world, copies of experts over dp, and all shards over groups."""
    for unit in _outside_fsdp(units):
        yield axes.copies.reduce(unit.trained_bytes)
    for unit in units.all():
        axis = axes.world if unit is units.kept else axes.groups
        yield axis.reduce(unit.trained_bytes)
    yield axes.slices.reduce(sum_of_slices(sizes, units))
    yield axes.world.reduce(_NORM_BYTES)


def _outside_fsdp(units: ModelUnits) -> Iterable[FsdpUnit]:
    return (unit for layer in units.layers for unit in layer.all if not unit.is_fsdp)
