"""Fill rows up to a number of tokens with whole examples, planned once for all ranks and epochs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.examples import TokenizedExamples

__all__ = ["PackedRows", "fill_rows", "pack_examples"]

OPEN_ROWS = 1024
"""Rows, the newest ones, in which room is looked for."""


@dataclass(frozen=True)
class PackedRows:
    """Say which examples share a row.

    Attributes:
        examples: of all rows, one row after the other.
        starts: (rows + 1,) where each row begins among them.
        lengths: (rows,) tokens.
        num_label_tokens: (rows,) labels to learn.
    """

    examples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    num_label_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def expand(self, rows: Sequence[int]) -> list[int]:
        """Return the examples of some rows, in order."""
        parts = [self.examples[self.starts[row] : self.starts[row + 1]] for row in rows]
        return np.concatenate(parts).tolist() if parts else []


def fill_rows(lengths: Sequence[int], room: int) -> np.ndarray:
    """Put each item into the first open row that has room for it; return each one's row.

    Args:
        lengths: of the items in their order, none above `room`.
        room: of a row.
    """
    left = np.zeros(len(lengths), dtype=np.int64)
    row_of = np.zeros(len(lengths), dtype=np.int64)
    num_rows = 0
    for item, length in enumerate(lengths):
        first = max(0, num_rows - OPEN_ROWS)
        has_room = left[first:num_rows] >= length
        found = int(has_room.argmax()) if num_rows else 0
        if num_rows and has_room[found]:
            row = first + found
        else:
            row, num_rows = num_rows, num_rows + 1
            left[row] = room
        left[row] -= length
        row_of[item] = row
    return row_of


def pack_examples(examples: TokenizedExamples, order: Sequence[int], room: int) -> PackedRows:
    """Fill rows with examples in their order, first fit.

    Args:
        examples: all of them.
        order: those that are packed.
        room: tokens of a row.

    Raises:
        DataError: an example does not fit into a row.
    """
    chosen = np.asarray(order)
    lengths = examples.lengths[chosen]
    if lengths.max() > room:
        raise DataError(
            f"packing_length is {room}, but an example has {lengths.max()} tokens: it must be at "
            f"least as many, or max_seq_length, which cuts examples, at most {room}",
            parameters=("packing_length", "max_seq_length"),
        )
    row_of = fill_rows(lengths.tolist(), room)
    packed = chosen[np.argsort(row_of, kind="stable")]
    starts = np.cumsum([0, *np.bincount(row_of)])
    labels = examples.num_label_tokens
    return PackedRows(
        examples=packed,
        starts=starts,
        lengths=np.add.reduceat(examples.lengths[packed], starts[:-1], dtype=np.int64),
        num_label_tokens=np.add.reduceat(labels[packed], starts[:-1], dtype=np.int64),
    )
