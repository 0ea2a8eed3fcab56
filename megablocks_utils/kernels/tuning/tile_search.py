"""Measure which tiles our Triton kernels run fastest with.

What is timed is always the whole layer, forward and backward: no kernel runs alone in training, and
a tile that is fast by itself may leave the next kernel a cold cache. One kind of kernel after the
other takes each of its candidates, the others staying as they are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from types import MappingProxyType

import torch

from megablocks_utils.kernels.fused.tile import Tile, TileTable

__all__ = ["KINDS_OF_MODE", "TileSearch", "TimeMs", "Trial", "search_tiles", "time_on_cuda"]

TimeMs = Callable[[Callable[[], object]], float]
"""Runs it some times and returns milliseconds of one; infinity where memory does not suffice."""

KINDS_OF_MODE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "full": ("up", "linear", "act_backward", "weight_grad"),
        "frozen": ("up", "linear", "act_backward"),
        "lora": ("up", "linear", "skinny", "act_backward", "weight_grad"),
    }
)
"""The kernels that a layer runs, by which of its parameters are trained."""

_MIN_GAIN = 0.01  # two measurements of the same differ by about as much
_WARMUP, _REPEATS = 3, 15
_FLUSHED_BYTES = 256 * 1024**2  # more than any L2 cache


@dataclass(frozen=True)
class Trial:
    """One measurement: the layer with one kind's tile replaced.

    Attributes:
        kind: of the kernel.
        tile: its tile.
        time_ms: of the layer; infinity where memory did not suffice.
        is_taken: whether the search kept it.
    """

    kind: str
    tile: Tile
    time_ms: float
    is_taken: bool


@dataclass(frozen=True)
class TileSearch:
    """What a search has found.

    Attributes:
        start_ms: the layer's time with the tiles that the search began with.
        tiles: the fastest table.
        trials: all measurements, in their order.
    """

    start_ms: float
    tiles: TileTable
    trials: tuple[Trial, ...]


def search_tiles(
    run: Callable[[TileTable], object],
    *,
    start: TileTable,
    candidates: Mapping[str, Sequence[Tile]],
    time_ms: TimeMs,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> TileSearch:
    """Find the fastest tiles.

    Args:
        run: runs the layer with these tiles, forward and backward.
        start: tiles to begin with.
        candidates: those to try, for the kinds that the layer runs.
        time_ms: measures.
        on_trial: told of each measurement.
    """
    start_ms = time_ms(lambda: run(start))
    best, best_ms = start, start_ms
    trials: list[Trial] = []
    for kind, tiles in candidates.items():
        for tile in tiles:
            if tile == getattr(start, kind):
                continue
            changed = replace(best, **{kind: tile})
            changed_ms = time_ms(partial(run, changed))
            is_taken = changed_ms < best_ms * (1 - _MIN_GAIN)
            if is_taken:
                best, best_ms = changed, changed_ms
            trials.append(Trial(kind, tile, changed_ms, is_taken))
            on_trial(trials[-1])
    return TileSearch(start_ms, best, tuple(trials))


def time_on_cuda(run: Callable[[], object]) -> float:
    """Return the median milliseconds of a run by CUDA events, with a cold L2 cache.

    Infinity where the GPU's memory, or a program's shared memory, does not suffice.
    """
    from triton.runtime.errors import OutOfResources

    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    times_ms = []
    try:
        for _ in range(_WARMUP):
            run()
        for _ in range(_REPEATS):
            flushed.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times_ms.append(start.elapsed_time(end))
    except (torch.OutOfMemoryError, OutOfResources):
        return math.inf
    return median(times_ms)
