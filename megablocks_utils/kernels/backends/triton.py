"""This project's Triton kernels as a backend; Triton is imported when they are loaded."""

from functools import partial

import torch

from megablocks_utils.config import backends
from megablocks_utils.kernels.backends.backend import Backend, ExpertBackend
from megablocks_utils.kernels.fused.tiles import TileTable

__all__ = ["TRITON"]


def _load(tiles: TileTable | None) -> ExpertBackend:
    from megablocks_utils.kernels.fused.fused_experts import run_experts_triton

    return run_experts_triton if tiles is None else partial(run_experts_triton, tiles=tiles)


TRITON = Backend(
    backends.TRITON,
    _load,
    takes_tiles=True,
    packages=("triton",),
    install="pip install triton",
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    on_cpu="interpreted",
    oldest_capability=(8, 0),
    supports_any_gate=False,
    serves_transformers=True,
)
