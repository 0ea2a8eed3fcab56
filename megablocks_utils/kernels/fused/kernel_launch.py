"""What every launch of a kernel needs: who gets which rows, how matrices lie, how to compile."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from megablocks_utils.kernels.device import is_interpreted
from megablocks_utils.kernels.fused.layer_tiles import count_processors
from megablocks_utils.kernels.fused.matrices import AnyMatrix, Matrix
from megablocks_utils.kernels.fused.tile import Tile
from megablocks_utils.kernels.gate import KnownActivation, KnownGate

GROUP_M = 8
"""Row tiles that share a column tile's weights while these are in L2."""

MAX_BLOCK_RANK = 64
"""Ranks of an adapter that a program multiplies at a time."""


@dataclass(frozen=True)
class Routing:
    """Say which rows go to which expert; nothing of it is known on the host but sizes.

    Attributes:
        order: (N,) routed row at each sorted place; None: rows lie sorted.
        offsets: (L + 1,) int32; expert e has the sorted rows from offsets[e] up to offsets[e + 1].
        num_rows: N.
        top_k: K.
    """

    order: Tensor | None
    offsets: Tensor
    num_rows: int
    top_k: int

    @property
    def num_experts(self) -> int:
        """L."""
        return self.offsets.numel() - 1

    @cached_property
    def experts_pow2(self) -> int:
        """L, or the next power of two."""
        return triton.next_power_of_2(self.num_experts)

    def num_tiles(self, block_m: int) -> int:
        """Return how many row tiles there can be at most: each expert wastes less than one."""
        most = (self.num_rows + self.num_experts * (block_m - 1)) // block_m
        return min(self.num_rows, most)


@dataclass(frozen=True)
class LoraRows:
    """A low-rank product that a kernel adds to its result: `rows @ factor`.

    Attributes:
        rows: (N, r) in expert order, scaled.
        factor: the experts' (r, columns).
    """

    rows: Tensor
    factor: Matrix


@dataclass(frozen=True)
class GateLayout:
    """Say how the first projection's outputs lie, and what the gate or activation makes of them."""

    gate: KnownGate | KnownActivation
    is_interleaved: bool

    @property
    def has_halves(self) -> bool:
        """Whether the outputs are all gates, then all ups."""
        return self.has_gate and not self.is_interleaved

    @property
    def has_gate(self) -> bool:
        """Whether there are 2 * I outputs of gate and up, not I of up alone."""
        return isinstance(self.gate, KnownGate)

    def constants(self) -> dict[str, Any]:
        """Return what kernels with a gate are compiled for."""
        known = self.gate if isinstance(self.gate, KnownGate) else KnownGate(self.gate.activation)
        return {
            "ACTIVATION": known.activation.value,
            "CLAMP": known.clamp.value,
            "ALPHA": known.alpha,
            "LIMIT": known.limit,
        }


@dataclass(frozen=True)
class KernelLaunch:
    """What every matrix kernel takes besides tensors and sizes.

    Attributes:
        weights: the experts' matrices that rows are multiplied by.
        routing: which rows go to which expert.
        tile: sizes of a program's work.
        lora: a low-rank product to add; or None.
    """

    weights: AnyMatrix
    routing: Routing
    tile: Tile
    lora: LoraRows | None = None

    def grid(self, num_cols: int) -> tuple[int, int]:
        """Return the numbers of row tiles and of column tiles."""
        return self.routing.num_tiles(self.tile.block_m), triton.cdiv(num_cols, self.tile.block_n)

    @property
    def is_persistent(self) -> bool:
        """Whether few programs share all tiles; an adapter must be one step of its ranks then."""
        fits = self.lora is None or self.lora.factor.num_rows <= MAX_BLOCK_RANK
        return self.tile.programs_per_processor > 0 and fits

    def count_programs(self, num_cols: int) -> int:
        """Return how many programs share the tiles: one for each, or the persistent ones."""
        tiles_m, tiles_n = self.grid(num_cols)
        if not self.is_persistent:
            return tiles_m * tiles_n
        persistent = self.tile.programs_per_processor * count_processors(self.weights.device)
        return min(persistent, tiles_m * tiles_n)

    def adapter_argument(self) -> tuple[Any, ...]:
        """Return the tuple that `add_low_rank` takes; without an adapter, one that is not read."""
        if self.lora is None:
            return (self.routing.offsets, self.routing.offsets, 1, (1, 1, 1))
        factor = self.lora.factor
        return (self.lora.rows, factor.tensor, factor.num_rows, factor.strides)

    def constants(self) -> dict[str, Any]:
        """Return the constants, and how to compile."""
        return {
            "TOP_K": self.routing.top_k,
            "EXPERTS_POW2": self.routing.experts_pow2,
            "BLOCK_M": self.tile.block_m,
            "BLOCK_N": self.tile.block_n,
            "BLOCK_K": self.tile.block_k,
            "BLOCK_R": block_rank(self.lora.factor.num_rows) if self.lora else 16,
            "GROUP_M": GROUP_M,
            "HAS_ORDER": self.routing.order is not None,
            "HAS_LORA": self.lora is not None,
            "LOAD": self.weights.load(self.tile),
            **compile_options(self.tile),
        }


def block_rank(rank: int) -> int:
    """Return how many ranks of an adapter a program multiplies at a time (16 at least, for dot)."""
    return min(max(16, triton.next_power_of_2(rank)), MAX_BLOCK_RANK)


def narrow(tile: Tile, num_cols: int) -> Tile:
    """Return a tile that is not much wider than a result of few columns."""
    return replace(tile, block_n=min(tile.block_n, block_rank(num_cols)))


def compile_options(tile: Tile) -> dict[str, Any]:
    """Return how products are made and how a matrix kernel is compiled.

    fp32 is multiplied in fp32 unless torch itself is allowed to use tf32.
    """
    return {
        # Not `allow_tf32`, which cannot be read once this one was set (as TrainingArguments does).
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "INTERPRET": is_interpreted(),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
