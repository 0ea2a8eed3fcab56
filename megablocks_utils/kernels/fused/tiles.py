"""Stub."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Stub."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    uses_tma: bool = False


@dataclass(frozen=True)
class TileTable:
    """Stub."""

    up: Tile
    linear: Tile
    skinny: Tile
    act_backward: Tile
    weight_grad: Tile


INTERPRET = TileTable(*[Tile(16, 32, 16, 4, 1)] * 4, Tile(32, 32, 16, 4, 1))
