"""Cut a model into FSDP's units, as `fsdp.fsdp2` and `fsdp.fsdp1` do."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

from megablocks_utils.config.quantization import BLOCKS, count_packed_bytes
from megablocks_utils.dtypes import itemsize
from megablocks_utils.planning.memory.fsdp_units import (
    FsdpUnit,
    LayerUnits,
    ModelUnits,
    ParamShard,
)
from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.parameter_shapes import (
    DENSE,
    MIXER,
    LayerShape,
    ParameterShape,
)
from megablocks_utils.planning.model.prediction import ParallelLayout, PlannedRun

__all__ = ["build_units"]

_FLAT_ALIGNMENT_BYTES = 16  # a parameter within a flat one of FSDP1 begins at such an address


def build_units(shape: ModelShape, layout: ParallelLayout, run: PlannedRun) -> ModelUnits:
    """Say what rank 0 holds of a model, unit by unit."""
    builder = _Builder(shape, layout, run)
    layers = {id(layer): builder.layer(layer) for layer in shape.layers}
    outside = [builder.base(parameter) for parameter in shape.outside]
    num_first = 0 if shape.is_tied or run.entry_point == "fsdp1" else 1
    return ModelUnits(
        embedding=builder.unit(outside[:1]) if num_first else None,
        layers=tuple(layers[id(layer)] for layer in shape.layers),
        tail=builder.unit(outside[num_first:]),
        kept=builder.kept(),
    )


@dataclass(frozen=True)
class _Builder:
    shape: ModelShape
    layout: ParallelLayout
    run: PlannedRun

    def layer(self, layer: LayerShape) -> LayerUnits:
        """Return the units of one decoder layer."""
        experts = [p for p in layer.parameters if p.room == "experts"]
        adapters = list(self._linear_adapters(layer))
        others = [p for p in layer.parameters if not (p.is_kept and self._keeps)]
        if self.run.has_own_experts(self.layout):
            others = [p for p in others if p.room != "experts"]
        else:
            experts = []
        base, low_rank = list(map(self.base, others)), list(map(self.adapter, adapters))
        is_fsdp1 = self.run.entry_point == "fsdp1"
        return LayerUnits(
            layer=self.unit(base if is_fsdp1 else base + low_rank),
            experts=self._expert_unit(experts) if experts else None,
            adapters=self.unit(low_rank) if is_fsdp1 and low_rank else None,
        )

    def base(self, parameter: ParameterShape) -> ParamShard:
        """Return a weight of the model, sharded over the ranks of a group."""
        stored = itemsize(self.run.precision.weights)
        shape = self._split(parameter.shape, parameter.tp_dim)
        shard = self._shard(shape, stored, self._is_trained(parameter))
        num_slices = 1 if parameter.tp_dim is None else self.run.tp_size
        return replace(shard, is_matrix=_is_matrix(parameter), num_slices=num_slices)

    def adapter(self, shape: tuple[int, ...]) -> ParamShard:
        """Return an adapter's factor, sharded over the ranks of a group."""
        shard = self._shard(shape, itemsize(self.run.precision.adapter), True)
        return replace(shard, is_matrix=min(shape) > 1)

    def _split(self, shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
        """Return the part of a tensor that a rank of a tp group has; all of it without a dim."""
        return tuple(n // self.run.tp_size if i == dim else n for i, n in enumerate(shape))

    def kept(self) -> FsdpUnit | None:
        """Return what every rank holds whole, of all layers; None for nothing."""
        kept = [p for p in self.shape.all_parameters() if p.is_kept and self._keeps]
        fp32 = itemsize("float32")
        shards = (ParamShard(p.shape, p.numel, fp32, self._is_trained(p)) for p in kept)
        return FsdpUnit(tuple(shards), 1, False, fp32) if kept else None

    def _is_trained(self, parameter: ParameterShape) -> bool:
        return self.run.use_lora == "none" and not parameter.is_frozen

    @property
    def _keeps(self) -> bool:
        """Whether what is computed with is narrower than what is kept."""
        return self.run.precision.compute != "float32"

    def unit(self, shards: list[ParamShard]) -> FsdpUnit:
        """Put parameters that are sharded over the ranks of a group in a unit."""
        compute, shard_size = itemsize(self.run.precision.compute), self.run.dense_shard_size
        if self.run.entry_point == "fsdp2":
            return FsdpUnit(tuple(shards), shard_size, True, compute)
        padding = _flat_padding(shards, shard_size)
        return FsdpUnit(tuple(shards), shard_size, True, compute, padding)

    def _shard(self, shape: tuple[int, ...], stored: int, is_trained: bool) -> ParamShard:
        shard_size = self.run.dense_shard_size
        if self.run.entry_point == "fsdp1":
            # Exact to the element only with what `_flat_padding` adds.
            return ParamShard(shape, prod(shape) // shard_size, stored, is_trained)
        return ParamShard(shape, _held(shape, 0, shard_size), stored, is_trained)

    def _expert_unit(self, experts: Iterable[ParameterShape]) -> FsdpUnit:
        precision, run = self.run.precision, self.run
        num_copies = run.count_copies(self.layout)
        # FSDP1 leaves experts of this project's alone, also where only adapters made them so.
        is_sharded = (
            self.layout.expert_dp == "shard" and num_copies > 1 and run.entry_point == "fsdp2"
        )
        is_fsdp = is_sharded or (num_copies == 1 and run.cpu_offload == "params")
        ranks = num_copies if is_sharded else 1
        shards = [shard for p in experts for shard in self._projection(p, ranks)]
        return FsdpUnit(tuple(shards), ranks, is_fsdp, itemsize(precision.compute))

    def _projection(self, parameter: ParameterShape, ranks: int) -> Iterator[ParamShard]:
        """Yield one of the experts' weights and the factors of its adapter, cut over dp ranks.

        Of each expert this rank has a slice: of down its inputs, of gate and up their outputs, for
        which FSDP cuts another dim. The factor that sees no slice is whole.
        """
        precision, run, num_slices = self.run.precision, self.run, self.run.expert_tp_size
        num_experts, num_out, num_in = parameter.shape
        num_local, rank = num_experts // self.layout.ep_size, run.lora_r
        is_down = (num_out, num_in) == (self.shape.hidden_size, self.shape.expert_size)
        if is_down:
            num_in //= num_slices
        else:
            num_out //= num_slices
        in_parts = num_slices > 1 and not is_down
        is_trained, stored = self._is_trained(parameter), itemsize(precision.weights)
        weight = _cut((num_local, num_out, num_in), ranks, stored, is_trained, in_parts=in_parts)
        weight = replace(weight, is_matrix=_is_matrix(parameter), num_slices=num_slices)
        yield weight if run.packed_format is None else self._pack(weight, ranks, in_parts=in_parts)
        if not run.trains_experts:
            return
        stored = itemsize(precision.adapter)
        first = _cut((num_local, rank, num_in), ranks, stored, True)
        second = _cut((num_local, num_out, rank), ranks, stored, True, in_parts=in_parts)
        for factor, is_cut in ((first, is_down), (second, not is_down)):
            yield replace(factor, is_matrix=rank > 1, num_slices=num_slices if is_cut else 1)

    def _pack(self, weight: ParamShard, ranks: int, *, in_parts: bool) -> ParamShard:
        """Shard packed experts over dp: whole ones, else rows in whole blocks, else with padding.

        As `fsdp.packed_shards` does; what is stored (in, out) has its rows in the last dim.
        """
        name = self.run.packed_format
        assert name is not None, weight
        num_local, num_out, num_in = weight.shape
        by_rows = num_local % ranks != 0 and num_out % (ranks * BLOCKS[name][0]) == 0
        by_rows = by_rows and not in_parts
        num_held = num_local if by_rows else -(-num_local // ranks)
        num_shards = ranks if by_rows else 1
        of_expert = count_packed_bytes(
            name,
            num_out // num_shards,
            num_in,
            num_slices=weight.num_slices,
            num_shards=num_shards,
        )
        return replace(
            weight,
            numel=num_held * num_out // num_shards * num_in,
            packed_bytes=num_held * of_expert,
            is_restacked=by_rows,
        )

    def _linear_adapters(self, layer: LayerShape) -> Iterable[tuple[int, ...]]:
        is_adapted = {MIXER: self.run.trains_attention, DENSE: self.run.trains_dense}
        for parameter in layer.parameters:
            if is_adapted.get(parameter.adapter):
                num_out, num_in = parameter.shape
                # B is split as columns are, A as rows.
                dim = parameter.tp_dim
                yield self._split((self.run.lora_r, num_in), 1 if dim == 1 else None)
                yield self._split((num_out, self.run.lora_r), 0 if dim == 0 else None)


def _is_matrix(parameter: ParameterShape) -> bool:
    """Say whether Muon trains a weight: one of a linear layer in a decoder layer, or experts'."""
    num_dims = {"attention": 2, "mlp": 2, "experts": 3}.get(parameter.room)
    return len(parameter.shape) == num_dims and min(parameter.shape[-2:]) > 1


def _cut(
    shape: tuple[int, ...], ranks: int, stored: int, is_trained: bool, *, in_parts: bool = False
) -> ParamShard:
    """Shard experts over dp: along the first dim that divides, else the first with padding.

    Not along the second where gate and up are cut `in_parts` there.
    """
    dims = [dim for dim in range(len(shape)) if not (in_parts and dim == 1)]
    dim = next((dim for dim in dims if shape[dim] % ranks == 0), 0)
    return ParamShard(shape, _held(shape, dim, ranks), stored, is_trained, is_restacked=dim > 0)


def _held(shape: tuple[int, ...], dim: int, ranks: int) -> int:
    return prod(shape) // shape[dim] * -(-shape[dim] // ranks)


def _flat_padding(shards: list[ParamShard], ranks: int) -> int:
    """Return what a rank's part of a flat parameter has beyond the whole quotients of its shards.

    Parameters begin at aligned places of the flat one, and it is filled up to divide by the ranks.
    """
    total = 0
    for shard in shards:
        step = _FLAT_ALIGNMENT_BYTES // shard.stored
        total = -(-total // step) * step + shard.whole
    return -(-total // ranks) - sum(shard.numel for shard in shards)
