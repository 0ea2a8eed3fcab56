"""How much shared memory a program of each Triton kernel takes, and how much there is."""

from collections.abc import Mapping
from types import MappingProxyType

from megablocks_utils.kernels.fused.kernel_launch import MAX_BLOCK_RANK
from megablocks_utils.kernels.fused.row_gemm import NARROW
from megablocks_utils.kernels.fused.tile import Tile

__all__ = ["SHARED_LIMIT_BYTES", "shared_bytes"]

_KIB = 1024
_ORDER_BYTES = 8
_BARRIER_BYTES = 8

SHARED_LIMIT_BYTES: Mapping[str, int] = MappingProxyType(
    {"sm_80": 163 * _KIB, "sm_86": 99 * _KIB, "sm_90": 227 * _KIB, "sm_100": 227 * _KIB}
)
"""Shared memory that one program may have, by architecture."""


def shared_bytes(kind: str, tile: Tile, itemsize: int) -> int:
    """Return the shared memory that a program of a kind needs.

    The operands of `num_stages` steps lie there at once; `up` has two on the side of the weights.
    `weight_grad` looks its rows up, and has the order of one step less there too. The result passes
    through the same memory once these are done with. Persistent programs load meanwhile, and have
    separate room for results, or for the adapter's operands; each step of weights has a barrier.

    Exactly what Triton 3.9 allocates on sm_90, of persistent programs with rank 64; on sm_100
    these take up to 96 bytes more. Before Hopper one step less is kept, and this is an upper bound.
    """
    num_sides = 2 if kind == "up" else 1
    step = (tile.block_m + num_sides * tile.block_n) * tile.block_k
    operands = itemsize * tile.num_stages * step
    if tile.programs_per_processor:
        part = tile.block_n if tile.block_n <= NARROW.value else tile.block_n // 4
        adapter = (tile.block_m + part) * MAX_BLOCK_RANK
        barriers = _BARRIER_BYTES * tile.num_stages * num_sides
        return operands + itemsize * max(tile.block_m * part, adapter) + barriers
    order = _ORDER_BYTES * tile.block_k * (tile.num_stages - 1) if kind == "weight_grad" else 0
    return max(operands + order, itemsize * tile.block_m * tile.block_n)
