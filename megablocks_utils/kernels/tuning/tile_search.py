"""Measure which tiles our Triton kernels run fastest with, and whether they win at all.

What is timed is always the whole layer, forward and backward: no kernel runs alone in training, and
a tile that is fast by itself may leave the next kernel a cold cache. One kind of kernel after the
other takes each of its candidates, the others staying as they are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from types import MappingProxyType

import torch

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.fused.tiles import Tile, TileTable

__all__ = ["KINDS_OF_MODE", "SearchResult", "TimeMs", "Trial", "search_layer", "time_on_cuda"]

TimeMs = Callable[[Callable[[], object]], float]
"""Runs it some times and returns milliseconds of one; infinity where memory does not suffice."""

KINDS_OF_MODE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "full": ("up", "linear", "act_backward", "weight_grad"),
        "frozen": ("up", "linear", "act_backward"),
        "lora": ("up", "linear", "skinny", "act_backward", "weight_grad"),
    }
)
"""The kernels that a layer runs, by what of it is trained."""

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
        is_taken: whether the search went on with it.
    """

    kind: str
    tile: Tile
    time_ms: float
    is_taken: bool


@dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Attributes:
        start_ms: the layer's time with the tiles that the search began with.
        tiles: the fastest table.
        triton_ms: the layer's time with it; infinity where memory did not suffice.
        grouped_mm_ms: the time of torch's grouped products; likewise.
        trials: all measurements, in their order.
    """

    start_ms: float
    tiles: TileTable
    triton_ms: float
    grouped_mm_ms: float
    trials: tuple[Trial, ...]

    @property
    def winner(self) -> str:
        """The backend that `auto` should take; the portable one if there is no difference."""
        return "triton" if self.triton_ms < self.grouped_mm_ms else "grouped_mm"


def search_layer(
    run_triton: Callable[[TileTable], object],
    run_grouped_mm: Callable[[], object],
    *,
    start: TileTable,
    candidates: Mapping[str, Sequence[Tile]],
    time_ms: TimeMs,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> SearchResult:
    """Find the tiles and the winner; both backends are timed last, one right after the other.

    Args:
        run_triton: runs the layer with these tiles, forward and backward.
        run_grouped_mm: runs it with torch's grouped products.
        start: tiles to begin with.
        candidates: those to try, for the kinds that the layer runs.
        time_ms: measures.
        on_trial: told of each measurement.

    Raises:
        ConfigurationError: neither of the two fits in the GPU's memory.
    """
    start_ms = time_ms(lambda: run_triton(start))
    best, best_ms = start, start_ms
    trials: list[Trial] = []
    for kind, tiles in candidates.items():
        for tile in tiles:
            if tile == getattr(start, kind):
                continue
            changed = replace(best, **{kind: tile})
            changed_ms = time_ms(lambda table=changed: run_triton(table))
            is_taken = changed_ms < best_ms * (1 - _MIN_GAIN)
            if is_taken:
                best, best_ms = changed, changed_ms
            trials.append(Trial(kind, tile, changed_ms, is_taken))
            on_trial(trials[-1])
    triton_ms, grouped_mm_ms = time_ms(lambda: run_triton(best)), time_ms(run_grouped_mm)
    result = SearchResult(start_ms, best, triton_ms, grouped_mm_ms, tuple(trials))
    if math.isinf(result.triton_ms) and math.isinf(result.grouped_mm_ms):
        raise ConfigurationError(
            "the layer does not fit in this GPU's memory with either backend; give fewer --tokens."
        )
    return result


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
