"""Bytes that leave a rank in one optimizer step, by kind of collective.

Counted as in benchmarks/results/step_traffic.md. Reductions of metrics, a few dozen bytes a step,
are left out.
"""

from collections.abc import Iterable

from megablocks_utils.config.dispatch_cost import ROUTING_BYTES, WEIGHT_GRADIENT_BYTES
from megablocks_utils.planning.memory.dense_stages import exchanged_bytes, output_bytes
from megablocks_utils.planning.memory.fsdp_units import FsdpUnit, ModelUnits
from megablocks_utils.planning.memory.sizes import INDEX, Sizes
from megablocks_utils.planning.model.prediction import COLLECTIVES

__all__ = ["count_sent_bytes"]

_NORM_BYTES = 8


def count_sent_bytes(sizes: Sizes, units: ModelUnits) -> dict[str, int]:
    """Return what the rank sends that sends most."""
    run = sizes.run
    num_reductions = run.accumulation if run.sync_each_batch else 1
    counted = {
        "all_gather": run.accumulation * _count_all_gathers(units),
        "reduce_scatter": num_reductions * sum(_missing(g, g.reduced_bytes) for g in units.all()),
        "all_to_all": run.accumulation * (_count_exchanges(sizes) + _count_head_exchanges(sizes)),
        "all_reduce": _count_all_reduces(sizes, units),
    }
    return {kind: counted[kind] for kind in COLLECTIVES}


def _count_all_gathers(units: ModelUnits) -> int:
    """Gather everything in forward and in backward.

    The last unit of forward is the first of backward, and stays; the embedding's gradient does not
    need its weights.
    """
    once = (units.tail,) if units.embedding is None else (units.embedding, units.tail)
    return 2 * _gathered(units.all()) - _gathered(once)


def _gathered(units: Iterable[FsdpUnit]) -> int:
    return sum(_missing(unit, unit.gathered_bytes) for unit in units)


def _missing(unit: FsdpUnit, whole_bytes: int) -> int:
    """Return what a rank lacks of a whole."""
    return whole_bytes // unit.ranks * (unit.ranks - 1)


def _count_exchanges(sizes: Sizes) -> int:
    """Exchange counts, and rows out and back, in the layers of one micro-step."""
    ep_size, run = sizes.layout.ep_size, sizes.run
    if ep_size == 1:
        return 0
    num_pairs = 3 if run.gradient_checkpointing == "full" else 2
    away, returned = _leaving(sizes.num_sent, ep_size), _leaving(sizes.num_came, ep_size)
    row = sizes.shape.hidden_size * sizes.compute
    num_counts = sizes.shape.num_experts + ep_size * sizes.sends_tokens
    counts = num_counts * INDEX * (ep_size - 1) // ep_size
    routing = _leaving(sizes.num_routed, ep_size) * ROUTING_BYTES * sizes.sends_tokens
    weights = _leaving(sizes.num_received, ep_size) * WEIGHT_GRADIENT_BYTES * sizes.sends_tokens
    in_layer = num_pairs * (away + returned) * row + counts + routing + weights
    sent = sizes.shape.num_moe_layers * in_layer
    return sent - (returned * row + weights) * sizes.first_experts_send_nothing_back


def _count_head_exchanges(sizes: Sizes) -> int:
    """Exchange tokens for heads and back, around the attention of every layer."""
    sp_size, run = sizes.run.sp_size, sizes.run
    if sp_size == 1:
        return 0
    num_passes = (3 if run.gradient_checkpointing == "full" else 2) * len(sizes.shape.layers)
    num_passes -= sizes.first_experts_send_nothing_back
    one_pass = exchanged_bytes(sizes) + output_bytes(sizes)
    return num_passes * one_pass // sp_size * (sp_size - 1)


def _leaving(num_rows: int, ep_size: int) -> int:
    """Return the rows that the first rank of an ep group has not with itself."""
    return num_rows - -(-num_rows // ep_size)


def _count_all_reduces(sizes: Sizes, units: ModelUnits) -> int:
    """Reduce the norm over the world, copies of experts over dp, and all shards over groups."""
    run, world_size = sizes.run, sizes.run.world_size
    num_copies = run.shard_size // sizes.layout.ep_size
    copies = (g for layer in units.layers for g in layer.all if not g.is_fsdp)
    sent = sum(_all_reduced(unit.trained_bytes, num_copies) for unit in copies)
    sent += sum(_all_reduced(unit.trained_bytes, run.dp_replicate_size) for unit in units.all())
    if units.kept is not None:
        sent += _all_reduced(units.kept.trained_bytes, world_size)
    return sent + _all_reduced(_NORM_BYTES, world_size)


def _all_reduced(num_bytes: int, ranks: int) -> int:
    return num_bytes * 2 * (ranks - 1) // ranks
