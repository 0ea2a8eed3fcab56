"""Which backends there are, and whether one can run experts here.

Nothing optional is imported to answer that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError, MissingKernelError
from megablocks_utils.kernels.device import DeviceFacts
from megablocks_utils.kernels.eager import run_experts_eager
from megablocks_utils.kernels.fused.requirements import (
    TRITON_INSTALL,
    find_triton_unsupported_reason,
    is_triton_installed,
)
from megablocks_utils.kernels.fused.tiles import TileTable
from megablocks_utils.kernels.grouped_mm import (
    find_grouped_mm_unsupported_reason,
    run_experts_grouped_mm,
)
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.shapes import ExpertShapes
from megablocks_utils.kernels.weights import ExpertWeights

__all__ = ["ExpertBackend", "find_unsupported_reason", "load", "refuse"]


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
class _Backend:
    """What the table knows of a backend.

    Attributes:
        load: takes tiles and returns the backend.
        find_unsupported_reason: says in a clause why it cannot run these experts, or returns None.
        missing: the line that installs what it needs, or None.
    """

    load: Callable[[TileTable | None], ExpertBackend]
    find_unsupported_reason: Callable[[ExpertShapes, DeviceFacts], str | None]
    missing: str | None = None


def load(kernel: str, tiles: TileTable | None) -> ExpertBackend:
    """Import a backend; tiles are for `triton` and None elsewhere."""
    return _BACKENDS[kernel]().load(tiles)


def find_unsupported_reason(kernel: str, shapes: ExpertShapes, device: DeviceFacts) -> str | None:
    """Say in a clause why a backend cannot run these experts here, or return None."""
    backend = _BACKENDS[kernel]()
    if backend.missing is not None:
        return f"{kernel} is not installed ({backend.missing})"
    return backend.find_unsupported_reason(shapes, device)


def refuse(kernel: str, shapes: ExpertShapes, device: DeviceFacts) -> None:
    """Raise for a named backend that is not there or cannot run these experts.

    Raises:
        ConfigurationError: it is unknown, or has an unsupported_reason.
        MissingKernelError: it is not installed.
    """
    if kernel not in _BACKENDS:
        wanted = join_words(["auto", *_BACKENDS])
        raise ConfigurationError(f"--kernel is {kernel}, but it must be {wanted}.")
    backend = _BACKENDS[kernel]()
    if backend.missing is not None:
        raise MissingKernelError(
            f"--kernel is {kernel}, but {kernel} is not installed; install it with: "
            f"{backend.missing}"
        )
    unsupported_reason = backend.find_unsupported_reason(shapes, device)
    if unsupported_reason is not None:
        works = [
            name
            for name in ("triton", "grouped_mm", "eager")
            if find_unsupported_reason(name, shapes, device) is None
        ]
        raise ConfigurationError(
            f"--kernel is {kernel}, but {unsupported_reason}; --kernel {join_words(works)} works."
        )


def _supports_all(_shapes: ExpertShapes, _device: DeviceFacts) -> None:
    return None


def _eager() -> _Backend:
    return _Backend(lambda _tiles: run_experts_eager, _supports_all)


def _grouped_mm() -> _Backend:
    return _Backend(lambda _tiles: run_experts_grouped_mm, find_grouped_mm_unsupported_reason)


def _triton() -> _Backend:
    missing = None if is_triton_installed() else TRITON_INSTALL
    return _Backend(_load_triton, find_triton_unsupported_reason, missing)


def _load_triton(tiles: TileTable | None) -> ExpertBackend:
    from megablocks_utils.kernels.fused.fused_experts import run_experts_triton

    return run_experts_triton if tiles is None else partial(run_experts_triton, tiles=tiles)


def _scattermoe() -> _Backend:
    from megablocks_utils.kernels import scattermoe as adapter

    missing = None if adapter.is_scattermoe_installed() else adapter.SCATTERMOE_INSTALL
    find = partial(_ask_adapter, adapter.find_scattermoe_unsupported_reason)
    return _Backend(lambda _tiles: adapter.run_experts_scattermoe, find, missing)


def _megablocks() -> _Backend:
    from megablocks_utils.kernels import megablocks as adapter

    missing = None if adapter.is_megablocks_installed() else adapter.MEGABLOCKS_INSTALL
    find = partial(_ask_adapter, adapter.find_megablocks_unsupported_reason)
    return _Backend(lambda _tiles: adapter.run_experts_megablocks, find, missing)


def _ask_adapter(
    find: Callable[..., str | None], shapes: ExpertShapes, _device: DeviceFacts
) -> str | None:
    return find(
        shapes.hidden_size,
        shapes.intermediate_size,
        shapes.dtype,
        shapes.device_type,
        shapes.has_adapters,
    )


_BACKENDS: dict[str, Callable[[], _Backend]] = {
    "eager": _eager,
    "grouped_mm": _grouped_mm,
    "triton": _triton,
    "scattermoe": _scattermoe,
    "megablocks": _megablocks,
}
