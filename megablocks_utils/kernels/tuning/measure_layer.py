"""Measure a layer of some size on a device with every backend that can run it there."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import torch

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.backends.backend_table import BACKENDS
from megablocks_utils.kernels.backends.packed import serve_format
from megablocks_utils.kernels.device import DeviceFacts
from megablocks_utils.kernels.fused.tile import TileTable
from megablocks_utils.kernels.fused.tiles import choose_tiles, list_candidates, name_architecture
from megablocks_utils.kernels.shapes import ExpertShapes
from megablocks_utils.kernels.tuning.measurements import Entry, build_key
from megablocks_utils.kernels.tuning.random_layer import build_random_layer
from megablocks_utils.kernels.tuning.tile_search import (
    KINDS_OF_MODE,
    TileSearch,
    TimeMs,
    Trial,
    search_tiles,
)

__all__ = ["LayerTimes", "build_entry", "measure_layer"]


@dataclass(frozen=True)
class LayerTimes:
    """What was measured of a layer, forward and backward.

    Attributes:
        times_ms: of each backend that can run it here; infinity where memory did not suffice.
        search: for the tiles of our Triton kernels; None where they cannot run.
    """

    times_ms: Mapping[str, float]
    search: TileSearch | None

    @property
    def fastest(self) -> str:
        """The backend that `auto` will take."""
        return min(self.times_ms, key=lambda name: self.times_ms[name])


def measure_layer(
    shapes: ExpertShapes,
    facts: DeviceFacts,
    device: torch.device | str,
    *,
    lora_r: int,
    time_ms: TimeMs,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> LayerTimes:
    """Search for tiles, then time all backends right after each other.

    Args:
        shapes: the experts, with the number of rows.
        facts: what the device is.
        device: where the layer is put.
        lora_r: rank of adapters.
        time_ms: measures.
        on_trial: told of each measurement of the search.

    Raises:
        ConfigurationError: there are no two backends to compare, or the layer does not fit.
    """
    reasons = {n: b.find_unsupported_reason(shapes, facts) for n, b in BACKENDS.items()}
    names = [name for name, reason in reasons.items() if reason is None]
    if len(names) < 2:
        others = "; ".join(reason for reason in reasons.values() if reason is not None)
        raise ConfigurationError(f"only {names[0]} can run this layer here: {others}.")
    layer = build_random_layer(shapes, lora_r=lora_r, device=device)

    def run(name: str, tiles: TileTable | None) -> object:
        backend = BACKENDS[name]
        return layer.step(serve_format(backend, backend.load(tiles), shapes.weight_format))

    search = None
    for name in names:
        if BACKENDS[name].takes_tiles:
            search = _search(partial(run, name), shapes, facts, time_ms, on_trial)
    times_ms = {}
    for name in names:
        tiles = search.tiles if search and BACKENDS[name].takes_tiles else None
        times_ms[name] = time_ms(partial(run, name, tiles))
    if all(map(math.isinf, times_ms.values())):
        raise ConfigurationError(
            "the layer does not fit in this GPU's memory with any backend; fewer tokens need less.",
            parameters=("tokens",),
        )
    return LayerTimes(times_ms, search)


def _search(
    run: Callable[[TileTable], object],
    shapes: ExpertShapes,
    facts: DeviceFacts,
    time_ms: TimeMs,
    on_trial: Callable[[Trial], None],
) -> TileSearch:
    arch, itemsize = name_architecture(facts.capability), shapes.dtype.itemsize
    num_experts, _, num_rows = shapes.counts
    return search_tiles(
        run,
        start=choose_tiles(arch=arch, itemsize=itemsize, rows=num_rows, num_experts=num_experts),
        candidates={
            kind: list_candidates(kind, arch=arch, itemsize=itemsize)
            for kind in KINDS_OF_MODE[shapes.mode]
            # Others have `linear` for the first projection, too.
            if kind != "up" or (shapes.has_gate and not shapes.is_interleaved)
        },
        time_ms=time_ms,
        on_trial=on_trial,
    )


def build_entry(
    measured: LayerTimes, shapes: ExpertShapes, facts: DeviceFacts, lora_r: int
) -> Entry:
    """Return what is kept of a measurement."""
    key = build_key(shapes, facts)
    assert key is not None, shapes
    times_ms = {
        name: None if math.isinf(ms) else round(ms, 4) for name, ms in measured.times_ms.items()
    }
    return Entry(
        key=key,
        times_ms=times_ms,
        tiles=None if measured.search is None else measured.search.tiles,
        date=datetime.now(UTC).date().isoformat(),
        lora_r=lora_r if shapes.has_adapters else None,
    )
