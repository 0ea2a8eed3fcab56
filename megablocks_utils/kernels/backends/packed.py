"""Run experts whose weights are packed: the one place between backends and formats."""

from dataclasses import replace
from functools import partial

from torch import Tensor

from megablocks_utils.kernels.backends.backend import Backend, ExpertBackend
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.weights import ExpertWeights
from megablocks_utils.quantization.dequantized_use import dequantize, remade_in_backward

__all__ = ["run_packed", "serve_format"]


def serve_format(backend: Backend, run: ExpertBackend, weight_format: str | None) -> ExpertBackend:
    """Return what runs experts that are packed in a format, or that are not.

    Args:
        backend: which one it is.
        run: as it was loaded.
        weight_format: of the experts; None: they are not packed.
    """
    if weight_format is None or weight_format in backend.facts.unpacks:
        return run
    return partial(run_packed, run)


def run_packed(
    backend: ExpertBackend,
    tokens: Tensor,
    order: ExpertOrder,
    top_k_weights: Tensor | None,
    experts: ExpertWeights,
) -> Tensor:
    """Run experts on weights that are dequantized for it, and again in backward.

    Args:
        backend: computes with plain weights.
        tokens: see `ExpertBackend`, also for the next two.
        order: of their rows.
        top_k_weights: of their experts, or None.
        experts: with packed projections.
    """
    packed = experts.gate_up_proj, experts.down_proj
    gate_up, down = map(dequantize, packed)
    plain = replace(experts, gate_up_proj=gate_up, down_proj=down)
    with remade_in_backward(zip(packed, (gate_up, down), strict=True)):
        return backend(tokens, order, top_k_weights, plain)
