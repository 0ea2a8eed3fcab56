"""Which tokens of a batch attend to which, as lengths on the host instead of a mask."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["CausalBlocks", "Piece"]

_PIECE_TOKENS = (64, 512)
"""Fewest and most queries of a piece that a window cuts out of a block."""


@dataclass(frozen=True)
class Piece:
    """Queries that attend to keys in one call of a kernel for rectangles.

    Attributes:
        queries: these tokens of the batch.
        keys: those that any of them sees.
        mask: (queries, keys) 0 or minus infinity; None: each query sees the keys up to its own,
            and both are the same tokens.
    """

    queries: slice
    keys: slice
    mask: Tensor | None


class CausalBlocks:
    """Blocks of tokens, each of which sees itself and those before it in its block.

    It stands where transformers has a mask. FSDP1 and Accelerate look into dataclasses and
    tensors on their way to a layer, and leave this as it is.

    Args:
        lengths: tokens of each block, one after the other through all rows of the batch.
        window: how many tokens the last ones are that a token sees, itself among them; None: all.
        device: of the tokens.
    """

    def __init__(self, lengths: Sequence[int], window: int | None, device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.window = window if window is not None and window < self.longest else None
        self._device = device

    @property
    def longest(self) -> int:
        """Tokens of the longest block."""
        return max(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each block starts, and the end of the last."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return tuple(starts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all blocks: of the batch, padding counted."""
        return self.starts[-1]

    @cached_property
    def starts_on_device(self) -> Tensor:
        """`starts` as kernels for rows of any length take them: nothing waits for the device."""
        return torch.tensor(self.starts, dtype=torch.int32).to(self._device, non_blocking=True)

    def pieces(self, dtype: torch.dtype) -> Iterator[Piece]:
        """Yield what a kernel for rectangles must be called with; its masks are of this dtype."""
        for start, stop in pairwise(self.starts):
            first_stop = stop if self.window is None else min(stop, start + self.window)
            block = slice(start, first_stop)
            yield Piece(block, block, None)
            if self.window is not None and first_stop < stop:
                yield from self._later_pieces(first_stop, stop, self.window, dtype)

    def _later_pieces(
        self, start: int, stop: int, window: int, dtype: torch.dtype
    ) -> Iterator[Piece]:
        """Yield pieces whose queries all see a whole window."""
        smallest, largest = _PIECE_TOKENS
        size = min(max(window, smallest), largest)
        band = _band(size, window, dtype, self._device)
        for first in range(start, stop, size):
            last = min(first + size, stop)
            keys = slice(first - window + 1, last)
            mask = band[: last - first, : keys.stop - keys.start]
            yield Piece(slice(first, last), keys, mask)


@lru_cache(maxsize=8)
def _band(size: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the mask of queries that see as many keys each, every one from one further on."""
    ahead = torch.arange(size + window - 1) - torch.arange(size)[:, None]
    is_seen = (ahead >= 0) & (ahead < window)
    zeros = torch.zeros(is_seen.shape, dtype=dtype)
    return zeros.masked_fill_(~is_seen, float("-inf")).to(device)
