"""One switch for the ways to run the same experts, decided once, with the same signature for all.

A backend takes rows already in expert order and returns their results. `auto` says what it chose
and why; a backend that is named but cannot run is an error, never a silent change to another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.eager import run_experts_eager
from megablocks_utils.kernels.grouped_mm import find_grouped_mm_obstacle, run_experts_grouped_mm
from megablocks_utils.kernels.low_rank import LowRank

Activation = Callable[[Tensor], Tensor]


class ExpertBackend(Protocol):
    """Run local experts on rows in expert order.

    Takes rows (R, H), tokens_per_expert (L host integers that sum to R), gate_up_proj (L, 2 * I, H)
    with the gate rows first, down_proj (L, H, I), the gate's activation and an adapter of each
    projection, if it has one; returns (R, H). Differentiable in rows, weights and adapters; every
    expert's weight gets a gradient, also without rows, and a frozen one costs no gradient of its
    size.
    """

    def __call__(  # noqa: D102
        self,
        rows: Tensor,
        tokens_per_expert: list[int],
        gate_up_proj: Tensor,
        down_proj: Tensor,
        activation: Activation,
        *,
        gate_up_lora: LowRank | None = None,
        down_lora: LowRank | None = None,
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
