"""Measurements for tests."""

from dataclasses import replace

import torch

from megablocks_utils.kernels.fused.tile import Tile, TileTable
from megablocks_utils.kernels.fused.tiles import choose_tiles
from megablocks_utils.kernels.shapes import ExpertShapes
from megablocks_utils.kernels.tuning.measurements import Entry, build_key
from tests.kernels.facts import H100

SHAPES = ExpertShapes(
    4096,
    14336,
    torch.bfloat16,
    "cuda",
    mode="lora",
    num_local_experts=8,
    top_k=2,
    num_rows=32768,
)
TILES: TileTable = replace(
    choose_tiles(arch="sm_90", itemsize=2, rows=32768, num_experts=8),
    up=Tile(128, 128, 64, 8, 3),
)


def measured(times_ms=None, *, shapes=SHAPES, device=H100, **changed) -> Entry:
    """Return an entry; without times, one in which triton is the fastest."""
    values = {
        "key": build_key(shapes, device),
        "times_ms": times_ms or {"grouped_mm": 20.5, "triton": 12.0},
        "tiles": TILES,
        "date": "2026-01-02",
        "lora_r": 16,
    }
    return Entry(**values | changed)
