"""What one program of a Triton kernel computes, and how it is compiled."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

__all__ = ["KINDS", "Tile", "TileTable"]

_CODE_STEP_BYTES, _WIDE = 64, 64 * 128


@dataclass(frozen=True)
class Tile:
    """Say what one program computes, and how it is compiled.

    Attributes:
        block_m: rows of the result (of `weight_grad`: columns of its left side).
        block_n: columns of the result.
        block_k: how much of the sum is added at a time.
        num_warps: groups of 32 threads.
        num_stages: pieces of the operands that lie in shared memory at once.
        uses_tma: whether weights are loaded by tensor descriptors, where their sizes allow it.
        programs_per_processor: how many persistent programs on each processor share all tiles,
            as `tile_walk` says; 0 is one program a tile.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    uses_tma: bool = False
    programs_per_processor: int = 0


@dataclass(frozen=True)
class TileTable:
    """Hold a tile for each kind of kernel.

    Attributes:
        up: gate and up at once, two accumulators, and the gate.
        linear: rows by a matrix: the down projection, and the backward pass through the first; and
            the first without a gate, or with gates and ups in turn.
        skinny: rows by a matrix of few columns, the rank of an adapter.
        act_backward: rows by a matrix, and the backward pass through the gate.
        weight_grad: sum of outer products of an expert's rows.
    """

    up: Tile
    linear: Tile
    skinny: Tile
    act_backward: Tile
    weight_grad: Tile

    def __post_init__(self) -> None:
        """Refuse persistent programs of kernels that have none.

        Raises:
            ValueError: there is one.
        """
        for kind in ("act_backward", "weight_grad"):
            if getattr(self, kind).programs_per_processor:
                raise ValueError(f"{kind} has no persistent programs: {getattr(self, kind)}")

    def for_codes(self, itemsize: int) -> Self:
        """Return tiles for weights that the kernels look up: a step of them is in registers, too.

        Less of a sum at a time, by more warps, in one program a tile: so no register spills.

        Args:
            itemsize: bytes of a number.
        """
        kinds = "up", "linear", "act_backward"
        narrowed = {kind: _for_codes(getattr(self, kind), itemsize) for kind in kinds}
        # What follows its product takes the most registers of all.
        through_gate = narrowed["act_backward"]
        rows = min(through_gate.block_m, through_gate.block_n)
        narrowed["act_backward"] = replace(through_gate, block_m=rows)
        return replace(self, **narrowed)

    def as_json(self) -> dict[str, dict[str, int]]:
        """Return what JSON can hold; `from_json` takes it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, payload: Mapping[str, Mapping[str, Any]]) -> Self:
        """Read what `as_json` wrote.

        Raises:
            ValueError: anything else.
        """
        names, count = {field.name for field in fields(Tile)}, "programs_per_processor"
        if set(payload) != set(KINDS):
            raise ValueError(f"tiles are for {', '.join(payload)} instead of {', '.join(KINDS)}")
        for kind, tile in payload.items():
            sizes = [size for name, size in tile.items() if name not in ("uses_tma", count)]
            is_whole = all(type(size) is int and size > 0 for size in sizes)
            is_whole &= type(tile.get(count, 0)) is int and tile.get(count, 0) >= 0
            # Files that are older than persistent programs do not say it.
            if {*tile, count} != names or not is_whole or type(tile["uses_tma"]) is not bool:
                raise ValueError(f"the tile for {kind} is {dict(tile)}")
        return cls(**{kind: Tile(**tile) for kind, tile in payload.items()})


KINDS: tuple[str, ...] = tuple(field.name for field in fields(TileTable))


def _for_codes(tile: Tile, itemsize: int) -> Tile:
    return replace(
        tile,
        block_k=min(tile.block_k, _CODE_STEP_BYTES // itemsize),
        num_warps=8 if tile.block_m * tile.block_n >= _WIDE else tile.num_warps,
        uses_tma=False,
        programs_per_processor=0,
    )
