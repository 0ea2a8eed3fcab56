"""One switch for the ways to run the same experts, decided once, with the same signature for all.

A backend takes tokens and the experts they are routed to, and returns their results. `auto` says
what it chose and why; a backend that is named but cannot run is an error, never a silent change to
another.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.eager import run_experts_eager
from megablocks_utils.kernels.grouped_mm import find_grouped_mm_obstacle, run_experts_grouped_mm
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.weights import ExpertWeights


class ExpertBackend(Protocol):
    """Run local experts on tokens, from gathering them to the weighted sum.

    Takes tokens (T, H), the order of their N = T * K routed rows, routing weights (T, K) and the
    experts; returns (T, H). Without routing weights K is 1 and results stand as they are: so expert
    parallelism runs rows that came from other ranks, which weight them at home. Differentiable in
    tokens, routing weights and all of the experts; every expert's weight gets a gradient, also
    without rows, and a frozen one costs no gradient of its size.
    """

    def __call__(  # noqa: D102
        self,
        tokens: Tensor,
        order: ExpertOrder,
        top_k_weights: Tensor | None,
        experts: ExpertWeights,
    ) -> Tensor: ...


@dataclass(frozen=True)
class ExpertShapes:
    """What a backend's rules depend on: sizes of one expert, dtype of compute, kind of device."""

    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    device_type: str


@dataclass(frozen=True)
class KernelChoice:
    """A backend, its name and the reason it was taken."""

    name: str
    reason: str
    run: ExpertBackend


_BACKENDS: dict[str, ExpertBackend] = {
    "eager": run_experts_eager,
    "grouped_mm": run_experts_grouped_mm,
}


def choose_backend(kernel: str, shapes: ExpertShapes) -> KernelChoice:
    """Resolve `--kernel` for the experts at hand.

    Raises:
        ConfigurationError: the named backend is unknown here or cannot run these shapes.
    """
    obstacle = find_grouped_mm_obstacle(
        shapes.hidden_size, shapes.intermediate_size, shapes.dtype, shapes.device_type
    )
    if kernel == "auto":
        name = "eager" if obstacle else "grouped_mm"
        reason = f"auto: {obstacle or 'torch.nn.functional.grouped_mm runs these shapes'}"
        return KernelChoice(name, reason, _BACKENDS[name])
    if kernel not in _BACKENDS:
        raise ConfigurationError(
            f"--kernel is {kernel}, but this version has {', '.join(['auto', *_BACKENDS])}."
        )
    if kernel == "grouped_mm" and obstacle:
        raise ConfigurationError(f"--kernel is grouped_mm, but {obstacle}; --kernel eager works.")
    return KernelChoice(kernel, "named by --kernel", _BACKENDS[kernel])
