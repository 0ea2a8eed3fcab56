"""Predict memory and traffic of a run from the model's sizes alone: milliseconds, no torch.

No number is fitted to a measurement: every byte has a name, in `units`, `fsdp2_buffers`, the files
of stages, and `traffic`.
"""

from megablocks_utils.config.optim import MUON
from megablocks_utils.dtypes import itemsize
from megablocks_utils.planning.memory.fsdp1_buffers import Fsdp1Buffers
from megablocks_utils.planning.memory.fsdp2_buffers import Accumulation, Fsdp2Buffers
from megablocks_utils.planning.memory.fsdp_units import FsdpUnit, ModelUnits
from megablocks_utils.planning.memory.ledger import Ledger
from megablocks_utils.planning.memory.micro_step import MicroStep
from megablocks_utils.planning.memory.model_stages import plan_layers
from megablocks_utils.planning.memory.sizes import FP32, Sizes
from megablocks_utils.planning.memory.traffic import count_traffic, sum_of_slices
from megablocks_utils.planning.memory.unit_builder import build_units
from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.prediction import ParallelLayout, PlannedRun, Prediction

__all__ = ["legal_layouts", "predict"]

_STEP_COUNTER_BYTES = 4
"""Adam counts steps in a number of its own for every parameter."""


def legal_layouts(
    shape: ModelShape, num_ranks: int, entry_point: str, *, is_dmoe: bool = False
) -> list[ParallelLayout]:
    """List every way to spread the experts of a model over the ranks of a group.

    Without expert parallelism first; then each ep_size above 1 that divides ranks and experts,
    sharded over dp before copied. FSDP1 leaves the experts alone, so there they can only be copied.

    Args:
        shape: the model.
        num_ranks: of a group; where each expert is split, those that have the same slice.
        entry_point: `fsdp2` or `fsdp1`.
        is_dmoe: whether the experts must be this project's also at ep_size 1.
    """
    layouts = [] if is_dmoe else [ParallelLayout(1, "shard")]
    for ep_size in range(1 if is_dmoe else 2, num_ranks + 1):
        if num_ranks % ep_size or shape.num_experts % ep_size:
            continue
        if entry_point == "fsdp2":
            layouts.append(ParallelLayout(ep_size, "shard", ep_size == 1))
        if entry_point == "fsdp1" or ep_size < num_ranks:
            layouts.append(ParallelLayout(ep_size, "replicate", ep_size == 1))
    return layouts


def predict(shape: ModelShape, layout: ParallelLayout, run: PlannedRun) -> Prediction:
    """Predict what one rank will hold and send.

    Args:
        shape: the model.
        layout: one of `legal_layouts`.
        run: the run.
    """
    sizes, units = Sizes(shape, layout, run), build_units(shape, layout, run)
    ledger, host_bytes = Ledger(), _host_bytes(units, run)
    parameters = sum(g.stored_bytes for g in units.all() if not _is_offloaded(g, run))
    ledger.hold("parameters", parameters)
    ledger.hold("optimizer", _optimizer_bytes(units, run))
    allocated_bytes = ledger.total + _left_gradients(units, run)
    accumulation = _last_micro_step(run)
    _hold_gradients(ledger, units, accumulation, run)
    ledger.forget_peak()
    MicroStep(
        sizes,
        units,
        plan_layers(sizes, units),
        ledger=ledger,
        buffers=_build_buffers(
            ledger,
            units,
            accumulation,
            run,
            prefetches=layout.ep_size > 1 and run.device_type == "cuda",
        ),
        has_expert_gradients=run.accumulation > 1,
    ).run()
    ledger.moment = "optimizer"
    ledger.transient("activations", sum_of_slices(sizes, units))
    ledger.transient("optimizer", _updated_bytes(units, run) + _muon_bytes(units, run))
    sent = count_traffic(sizes, units)
    return Prediction(ledger.peak, ledger.peak_moment, allocated_bytes, sent, host_bytes)


def _build_buffers(
    ledger: Ledger,
    units: ModelUnits,
    accumulation: Accumulation,
    run: PlannedRun,
    *,
    prefetches: bool,
) -> Fsdp1Buffers | Fsdp2Buffers:
    order = [unit for unit in units.all() if unit.is_fsdp]
    if run.entry_point == "fsdp1":
        return Fsdp1Buffers(ledger, order, accumulation)
    return Fsdp2Buffers(
        ledger,
        order,
        accumulation,
        num_not_gathered=int(units.embedding is not None),
        asking=_asking(units) if prefetches else (),
        is_offloaded=run.offloaded == "params",
    )


def _asking(units: ModelUnits) -> list[FsdpUnit]:
    """Return the units that ask for the next one's weights, as `fsdp.prefetch` chooses them."""
    asking = [
        unit
        for layer in units.layers
        for unit in (*layer.dense, layer.experts)
        if unit is not None and unit.is_fsdp
    ]
    return asking if units.embedding is None else [*asking, units.tail]


def _is_offloaded(unit: FsdpUnit, run: PlannedRun) -> bool:
    """Return whether a unit's shards lie in host memory, with their gradients and states."""
    return unit.is_fsdp and run.offloaded == "params"


def _host_bytes(units: ModelUnits, run: PlannedRun) -> int:
    """Return what is held in host memory, at its most."""
    if run.offloaded == "optimizer":
        return sum(_moment_bytes(unit, units, run) for unit in units.all())
    offloaded = [unit for unit in units.all() if _is_offloaded(unit, run)]
    held = sum(unit.stored_bytes + unit.trained_bytes for unit in offloaded)
    # A later micro-step's gradients are copied one by one, and added to those there.
    largest = max((unit.largest_trained_numel for unit in offloaded), default=0)
    added = largest * itemsize(run.precision.adapter)
    held += added * _last_micro_step(run).has_reduced
    return held + sum(_state_bytes(unit, units, run) for unit in offloaded)


def _optimizer_bytes(units: ModelUnits, run: PlannedRun) -> int:
    """Return the optimizer's states on the device."""
    on_device = [unit for unit in units.all() if not _is_offloaded(unit, run)]
    states = sum(_state_bytes(unit, units, run) for unit in on_device)
    return states - (_host_bytes(units, run) if run.offloaded == "optimizer" else 0)


def _updated_bytes(units: ModelUnits, run: PlannedRun) -> int:
    """Return states that an update brings from host memory: at most those of one parameter."""
    if run.offloaded != "optimizer":
        return 0
    largest = max(unit.largest_trained_numel for unit in units.all())
    return 2 * largest * itemsize(run.precision.optim)


def _muon_bytes(units: ModelUnits, run: PlannedRun) -> int:
    """Return what Muon's update of one parameter has at the most, beside its states.

    The update in fp32 and in bf16 of what is here; of the matrices in bf16 what is put together,
    one of its iteration, and its result.
    """
    if run.optim != MUON:
        return 0
    bf16 = itemsize("bfloat16")
    matrices = (matrix for unit in units.all() for matrix in unit.matrices)
    return max(
        (m.numel * (FP32 + bf16) + 3 * m.whole * m.num_slices * bf16 for m in matrices),
        default=0,
    )


def _state_bytes(unit: FsdpUnit, units: ModelUnits, run: PlannedRun) -> int:
    return _moment_bytes(unit, units, run) + unit.num_trained * _STEP_COUNTER_BYTES


def _moment_bytes(unit: FsdpUnit, units: ModelUnits, run: PlannedRun) -> int:
    state = FP32 if unit is units.kept else itemsize(run.precision.optim)
    moments = 2 * unit.trained_numel
    if run.optim == MUON:  # one, not Adam's two
        moments -= sum(shard.numel for shard in unit.matrices)
    return moments * state


def _left_gradients(units: ModelUnits, run: PlannedRun) -> int:
    """Return gradients that zero_grad leaves: FSDP1 frees its flat ones in the next forward."""
    flat = (unit.trained_bytes for unit in units.all() if unit.is_fsdp)
    return sum(flat) if run.entry_point == "fsdp1" else 0


def _last_micro_step(run: PlannedRun) -> Accumulation:
    """Say what the last micro-step of a step finds: none holds more."""
    is_first = run.accumulation == 1
    return Accumulation(
        reduces=True,
        has_reduced=not is_first and run.sync_each_batch,
        has_unreduced=not is_first and not run.sync_each_batch,
    )


def _hold_gradients(
    ledger: Ledger, units: ModelUnits, accumulation: Accumulation, run: PlannedRun
) -> None:
    """Hold what earlier micro-steps have left."""
    is_fsdp1 = run.entry_point == "fsdp1"
    for unit in units.all():
        if not unit.is_fsdp:
            ledger.hold("gradients", unit.trained_bytes * (run.accumulation > 1))
            continue
        if not _is_offloaded(unit, run):
            ledger.hold("gradients", unit.trained_bytes * accumulation.has_reduced)
        unreduced = unit.flat_gradient_bytes if is_fsdp1 else unit.whole_gradient_bytes
        ledger.hold("fsdp_buffers", unreduced * accumulation.has_unreduced)
