"""Which parameters FSDP gathers together, and what of them a rank holds.

The rank is the first of those that share a parameter, which none holds more than: where a dim does
not divide by the ranks, FSDP2 pads every shard to the size of the first one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

__all__ = ["FsdpUnit", "LayerUnits", "ModelUnits", "ParamShard"]


@dataclass(frozen=True)
class ParamShard:
    """A parameter as one rank holds it.

    Attributes:
        shape: that this rank computes with.
        numel: elements held, padding included.
        stored: bytes of an element.
        is_trained: whether it gets a gradient.
        is_restacked: whether shards are put together along another dim than the first, which
            takes a second copy of the whole.
        packed_bytes: what it takes where it is packed; None: `numel` times `stored`.
        is_matrix: whether it is what Muon trains, where it is asked for.
        num_slices: ranks that compute with other slices of it; 1 where this one has it whole.
    """

    shape: tuple[int, ...]
    numel: int
    stored: int
    is_trained: bool
    is_restacked: bool = False
    is_matrix: bool = False
    num_slices: int = 1
    packed_bytes: int | None = None

    @property
    def held_bytes(self) -> int:
        """What this rank holds."""
        return self.numel * self.stored if self.packed_bytes is None else self.packed_bytes

    @property
    def whole(self) -> int:
        """Elements this rank computes with."""
        return prod(self.shape)

    def gathers(self, compute: int) -> int:
        """Return the bytes of its elements in the dtype of compute, or packed."""
        return self.numel * compute if self.packed_bytes is None else self.packed_bytes

    def is_cast(self, compute: int) -> bool:
        """Say whether it is cast before it is gathered."""
        return self.stored != compute and self.packed_bytes is None


@dataclass(frozen=True)
class FsdpUnit:
    """Parameters that are gathered in one all-gather, and whose gradients are reduced in one.

    Attributes:
        shards: its parameters.
        ranks: that it is sharded over; 1 where this rank holds it whole.
        is_fsdp: whether FSDP holds it. What it does not hold is computed with as it lies.
        compute: bytes of an element that is computed with.
        padding: elements that a flat parameter of FSDP1 has beside its parameters', on this rank.
    """

    shards: tuple[ParamShard, ...]
    ranks: int
    is_fsdp: bool
    compute: int
    padding: int = 0

    @cached_property
    def stored_bytes(self) -> int:
        """Weights held."""
        return self._stored(self.shards)

    @cached_property
    def trained_bytes(self) -> int:
        """What of them is trained; its gradients take as much."""
        return self._stored(self._trained)

    @cached_property
    def trained_numel(self) -> int:
        """Elements held that are trained."""
        return sum(shard.numel for shard in self._trained) + self.padding * bool(self._trained)

    @cached_property
    def matrices(self) -> tuple[ParamShard, ...]:
        """What of it Muon trains, where it is asked for."""
        return tuple(shard for shard in self._trained if shard.is_matrix)

    @cached_property
    def num_trained(self) -> int:
        """Parameters that are trained."""
        return len(self._trained)

    @cached_property
    def gathered_bytes(self) -> int:
        """All ranks' shards in the dtype of compute; 0 for what FSDP does not hold."""
        held = sum(shard.gathers(self.compute) for shard in self.shards)
        whole = (held + self.padding * self.compute) * self.ranks
        return whole if self.is_fsdp else 0

    @property
    def buffer_bytes(self) -> int:
        """What an all-gather writes: the same, and nothing where there is one rank."""
        return self.gathered_bytes if self.ranks > 1 else 0

    @cached_property
    def cast_bytes(self) -> int:
        """Own shards cast to the dtype of compute, which are gathered instead of the stored."""
        held = sum(shard.numel for shard in self.shards if shard.is_cast(self.compute))
        return held * self.compute if self.is_fsdp and self.ranks > 1 else 0

    @cached_property
    def copied_in_bytes(self) -> int:
        """What copying own shards from host memory leaves on the device until they are gathered."""
        held = sum(shard.gathers(self.compute) for shard in self.shards)
        return held if self.ranks > 1 else 0

    @cached_property
    def copied_alone_bytes(self) -> int:
        """What one rank that gathers nothing has at the most beside the whole parameters.

        They are copied from host memory, cast and put into the whole one after the other, and each
        stays until the next one is cast.
        """
        whole = before = most = 0
        for shard in self.shards:
            stored, computed = shard.held_bytes, shard.gathers(self.compute)
            cast = computed if shard.is_cast(self.compute) else 0
            most = max(most, whole + before + stored + cast, whole + 2 * computed)
            whole, before = whole + computed, computed
        return most - whole

    @cached_property
    def largest_trained_numel(self) -> int:
        """Elements held of the largest parameter that is trained."""
        return max((shard.numel for shard in self._trained), default=0)

    @cached_property
    def restacked_bytes(self) -> int:
        """Second copies of gathered parameters that are put together along another dim."""
        cut = (shard for shard in self.shards if shard.is_restacked)
        return sum(shard.gathers(self.compute) for shard in cut) * self.ranks

    @cached_property
    def largest_restacked_bytes(self) -> int:
        """The largest gradient that is cut along another dim, and so copied."""
        cut = (shard.whole for shard in self._trained if shard.is_restacked)
        return max(cut, default=0) * self.compute

    @cached_property
    def last_gradient_bytes(self) -> int:
        """The gradient of its last parameter, in the dtype of compute."""
        return self._trained[-1].whole * self.compute if self._trained else 0

    @cached_property
    def first_gradient_bytes(self) -> int:
        """The gradient of its first parameter, in the dtype of compute."""
        return self._trained[0].whole * self.compute if self._trained else 0

    @cached_property
    def reduced_bytes(self) -> int:
        """Gradients of the whole in the dtype they are reduced in: that of trained weights."""
        return self.trained_bytes * self.ranks if self.is_fsdp else 0

    @cached_property
    def flat_gradient_bytes(self) -> int:
        """Gradients of the whole joined in one tensor, padding and all, in the dtype of compute."""
        return self.trained_numel * self.ranks * self.compute

    @cached_property
    def whole_gradient_bytes(self) -> int:
        """Gradients of the whole without padding, in the dtype they are reduced in."""
        return sum(shard.whole * shard.stored for shard in self._trained)

    @cached_property
    def whole_compute_bytes(self) -> int:
        """The same in the dtype of compute, as autograd makes them."""
        return sum(shard.whole for shard in self._trained) * self.compute

    @cached_property
    def _trained(self) -> tuple[ParamShard, ...]:
        return tuple(shard for shard in self.shards if shard.is_trained)

    def _stored(self, shards: tuple[ParamShard, ...]) -> int:
        padding = self.padding * shards[0].stored if shards else 0
        return sum(shard.held_bytes for shard in shards) + padding


@dataclass(frozen=True)
class LayerUnits:
    """A decoder layer.

    Attributes:
        layer: its parameters but those of the other units.
        experts: the experts where they are a unit of their own; None where the layer's own unit
            has them, or it has none.
        adapters: adapters that FSDP1 keeps in a flat parameter of their own; None elsewhere.
    """

    layer: FsdpUnit
    experts: FsdpUnit | None = None
    adapters: FsdpUnit | None = None

    @property
    def dense(self) -> tuple[FsdpUnit, ...]:
        """All but the experts' own."""
        return (self.layer,) if self.adapters is None else (self.layer, self.adapters)

    @property
    def trained_dense(self) -> FsdpUnit:
        """The one of them with what is trained."""
        return self.adapters or self.layer

    @property
    def all(self) -> tuple[FsdpUnit, ...]:
        """Every unit, in the order in which FSDP2 has done with them in the forward pass."""
        return tuple(g for g in (self.experts, self.layer, self.adapters) if g is not None)


@dataclass(frozen=True)
class ModelUnits:
    """Everything that a rank holds.

    Attributes:
        embedding: None where it is in the tail's unit.
        layers: decoder layers; layers of one kind are one object.
        tail: final norm and output head; with the embedding where it is tied to the head, and under
            FSDP1.
        kept: what every rank holds whole in float32; None for nothing.
    """

    embedding: FsdpUnit | None
    layers: tuple[LayerUnits, ...]
    tail: FsdpUnit
    kept: FsdpUnit | None = None

    def all(self) -> Iterator[FsdpUnit]:
        """Yield every unit in the order of the forward pass."""
        if self.kept is not None:
            yield self.kept
        if self.embedding is not None:
            yield self.embedding
        for layer in self.layers:
            yield from layer.all
        yield self.tail

    def sum(self, attribute: str) -> int:
        """Add an attribute up over all units."""
        return sum(getattr(unit, attribute) for unit in self.all())
