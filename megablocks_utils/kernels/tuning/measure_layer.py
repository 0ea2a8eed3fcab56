"""Measure a layer of some size on a device, and say what is kept of it."""

import math
from collections.abc import Callable
from datetime import UTC, datetime

import torch

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.available import find_unsupported_reason, load
from megablocks_utils.kernels.device import DeviceFacts
from megablocks_utils.kernels.fused.tiles import choose_tiles, list_candidates, name_architecture
from megablocks_utils.kernels.shapes import ExpertShapes
from megablocks_utils.kernels.tuning.measurements import Entry, build_key
from megablocks_utils.kernels.tuning.random_layer import build_random_layer
from megablocks_utils.kernels.tuning.tile_search import (
    KINDS_OF_MODE,
    SearchResult,
    TimeMs,
    Trial,
    search_layer,
)

__all__ = ["build_entry", "measure_layer"]


def measure_layer(
    shapes: ExpertShapes,
    facts: DeviceFacts,
    device: torch.device | str,
    *,
    lora_r: int,
    time_ms: TimeMs,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> SearchResult:
    """Measure a layer of these shapes.

    Args:
        shapes: the experts, with the number of rows.
        facts: what the device is.
        device: where the layer lies.
        lora_r: rank of adapters.
        time_ms: measures.
        on_trial: told of each measurement.

    Raises:
        ConfigurationError: triton or grouped_mm cannot run this layer here, or it does not fit.
    """
    for kernel in ("triton", "grouped_mm"):
        unsupported_reason = find_unsupported_reason(kernel, shapes, facts)
        if unsupported_reason is not None:
            raise ConfigurationError(
                f"tune compares triton with grouped_mm, but {unsupported_reason}."
            )
    kind_of_gpu = {
        "arch": name_architecture(facts.capability),
        "itemsize": shapes.dtype.itemsize,
    }
    layer = build_random_layer(shapes, lora_r=lora_r, device=device)
    return search_layer(
        lambda tiles: layer.step(load("triton", tiles)),
        lambda: layer.step(load("grouped_mm", None)),
        start=choose_tiles(
            rows=shapes.num_rows, num_experts=shapes.num_local_experts, **kind_of_gpu
        ),
        candidates={
            kind: list_candidates(kind, **kind_of_gpu) for kind in KINDS_OF_MODE[shapes.mode]
        },
        time_ms=time_ms,
        on_trial=on_trial,
    )


def build_entry(
    result: SearchResult, shapes: ExpertShapes, facts: DeviceFacts, lora_r: int
) -> Entry:
    """Return what is kept of a measurement."""

    def finite(time_ms: float) -> float | None:
        return None if math.isinf(time_ms) else round(time_ms, 4)

    return Entry(
        key=build_key(shapes, facts),
        winner=result.winner,
        tiles=result.tiles,
        triton_ms=finite(result.triton_ms),
        grouped_mm_ms=finite(result.grouped_mm_ms),
        date=datetime.now(UTC).date().isoformat(),
        lora_r=lora_r if shapes.has_adapters else None,
    )
