"""This project's Triton kernels as a backend; Triton is imported when they are loaded."""

from functools import partial

import torch

from megablocks_utils.config import backends
from megablocks_utils.config.values import join_words
from megablocks_utils.kernels.backends.backend import Backend, ExpertBackend
from megablocks_utils.kernels.device import DeviceFacts
from megablocks_utils.kernels.fused.tile import TileTable
from megablocks_utils.kernels.gate import Activation, KnownActivation, KnownGate
from megablocks_utils.kernels.shapes import ExpertShapes

__all__ = ["TRITON"]


def _load(tiles: TileTable | None) -> ExpertBackend:
    from megablocks_utils.kernels.fused.fused_experts import run_experts_triton

    return run_experts_triton if tiles is None else partial(run_experts_triton, tiles=tiles)


def _find_limit(shapes: ExpertShapes, _device: DeviceFacts) -> str | None:
    """Say that the gate is none that the kernels have inside, where it is not."""
    if isinstance(shapes.gate, KnownGate | KnownActivation):
        return None
    known = join_words([activation.value for activation in Activation])
    return f"triton knows gates and activations with {known}, and this model's is another"


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
