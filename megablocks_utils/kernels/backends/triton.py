"""This project's Triton kernels as a backend; Triton is imported when they are loaded."""

from functools import partial

import torch

from megablocks_utils.config import backends
from megablocks_utils.kernels.backends.backend import Backend, ExpertBackend
from megablocks_utils.kernels.device import DeviceFacts
from megablocks_utils.kernels.fused.tiles import TileTable
from megablocks_utils.kernels.gate import Activation, Clamp, KnownGate
from megablocks_utils.kernels.shapes import ExpertShapes

__all__ = ["TRITON"]


def _load(tiles: TileTable | None) -> ExpertBackend:
    from megablocks_utils.kernels.fused.fused_experts import run_experts_triton

    return run_experts_triton if tiles is None else partial(run_experts_triton, tiles=tiles)


def _find_limit(shapes: ExpertShapes, _device: DeviceFacts) -> str | None:
    """Say that the gate is none that the kernels have inside, where it is not."""
    gate = shapes.gate
    if (
        isinstance(gate, KnownGate)
        and gate.activation is Activation.SILU
        and gate.clamp in (Clamp.NONE, Clamp.GPT_OSS)
    ):
        return None
    return "triton knows SwiGLU and its clamped form, and this model's gate is another"


TRITON = Backend(
    backends.TRITON,
    _load,
    takes_tiles=True,
    packages=("triton",),
    install="pip install triton",
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    on_cpu="interpreted",
    oldest_capability=(8, 0),
    find_limit=_find_limit,
    serves_transformers=True,
)
