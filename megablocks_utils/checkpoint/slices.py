"""Read the part of a parameter or buffer that a rank holds, and no other byte of expert weights.

Parameters are named and split as in memory. A part of an expert weight is assembled from the stored
tensors that overlap it. One stored tensor (or its wanted rows) is read at a time and cast while it
is copied, so that a rank holds hardly more than its own part. Dense weights that transformers
converts are the exception: they are read whole on every rank, and cut after the conversion.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
from torch import Tensor

from megablocks_utils.checkpoint.expert_trace import ExpertPart, Span
from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.errors import CheckpointError

__all__ = ["SliceReader", "check_finite"]


class SliceReader:
    """Fill parts of a model's parameters from a checkpoint that `check_against_model` has passed.

    Args:
        index: the checkpoint.
        layout: where the model's parameters lie in it.
    """

    def __init__(self, index: CheckpointIndex, layout: ModelLayout) -> None:
        self.index = index
        self.layout = layout

    def fill_local(self, name: str, local: Tensor, offsets: tuple[int, ...]) -> None:
        """Read a part of a parameter or persistent buffer into `local`, in its dtype and device.

        Args:
            name: in the transformers model, not wrapped.
            local: the part, contiguous or not; may be empty, which reads nothing.
            offsets: where it begins in the whole parameter, along every dim.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or non-finite in this part.
        """
        if local.numel() == 0:
            return
        if name in self.layout.buffers:
            # Whole on every rank; infinite ones (limits of a clamp) are meant.
            local.copy_(self.index.read(self.layout.sources(name)[0]))
        elif self.layout.is_expert(name):
            self._fill_experts(name, local, offsets)
        elif self.layout.is_plain(name):
            self._fill_plain(name, local, offsets)
        else:
            whole = self.layout.convert(name, self._read_finite)
            local.copy_(_window(whole, offsets, tuple(local.shape)))

    def _fill_plain(self, name: str, local: Tensor, offsets: tuple[int, ...]) -> None:
        sources = self.layout.sources(name)
        if not sources:
            raise CheckpointError(f"{self.index.folder} has no tensor for {name}")
        (key,) = sources
        if not offsets:
            local.copy_(self._read_finite(key))
            return
        rows = self._read_rows(key, range(offsets[0], offsets[0] + len(local)))
        beyond = (o + n > m for o, n, m in zip(offsets, local.shape, rows.shape, strict=True))
        if any([*beyond][1:]):
            raise CheckpointError(
                f"{key} in {self.index.path(key)} has rows of shape {tuple(rows.shape[1:])}, wanted"
                f" is {tuple(local.shape[1:])} at {offsets[1:]}"
            )
        local.copy_(_window(rows, (0, *offsets[1:]), tuple(local.shape)))

    def _fill_experts(self, name: str, local: Tensor, offsets: tuple[int, ...]) -> None:
        """Fill experts x rows x columns of a weight (E, rows, columns), or of a bias (E, rows)."""
        first, *others = offsets
        first_row, first_column = (*others, 0)[:2]
        window = local if local.dim() == 3 else local[:, :, None]
        rows = range(first_row, first_row + window.shape[1])
        columns = range(first_column, first_column + window.shape[2])
        parts = self.layout.expert_parts(name, range(first, first + len(local)))
        for (key, item, expert), group in groupby(parts, lambda p: (p.key, p.item, p.expert)):
            wanted = [cut for part in group for cut in _cut(part, rows, columns)]
            if wanted:
                self._fill_matrix(window[expert - first], key, item, wanted)

    def _fill_matrix(
        self, target: Tensor, key: str, item: int | None, parts: list[ExpertPart]
    ) -> None:
        """Copy parts of one stored matrix, whose places are those in `target`, reading it once."""
        spans = [part.columns.stored if part.is_turned else part.rows.stored for part in parts]
        first, last = min(span[0] for span in spans), max(span[-1] for span in spans)
        matrix = self._read_rows(key, range(first, last + 1), item=item)
        for part in parts:
            moved = _shifted(part, first)
            moved.memory_block(target).copy_(moved.stored_block(matrix))

    def _read_rows(self, key: str, rows: range, *, item: int | None = None) -> Tensor:
        tensor = self.index.read_rows(key, rows.start, rows.stop, item=item)
        check_finite(tensor, f"{key} in {self.index.path(key)}")
        return tensor

    def _read_finite(self, key: str) -> Tensor:
        tensor = self.index.read(key)
        check_finite(tensor, f"{key} in {self.index.path(key)}")
        return tensor


def _cut(part: ExpertPart, rows: range, columns: range) -> Iterable[ExpertPart]:
    """Return a part's share of a window of the expert, its places counted within the window."""
    for row_span in _cut_span(part.rows, rows):
        for column_span in _cut_span(part.columns, columns):
            yield ExpertPart(
                part.key, part.item, part.expert, row_span, column_span, part.is_turned
            )


def _cut_span(span: Span, window: range) -> Iterator[Span]:
    inside = [n for n, place in enumerate(span.memory) if place in window]
    if inside:
        chosen = slice(inside[0], inside[-1] + 1)
        memory = span.memory[chosen]
        shift = window.start
        yield Span(
            span.stored[chosen], range(memory.start - shift, memory.stop - shift, memory.step)
        )


def _shifted(part: ExpertPart, first: int) -> ExpertPart:
    """Return a part whose stored rows are counted from row `first`, which was read first."""
    read = part.columns if part.is_turned else part.rows
    stored = range(read.stored.start - first, read.stored.stop - first, read.stored.step)
    moved = Span(stored, read.memory)
    rows, columns = (part.rows, moved) if part.is_turned else (moved, part.columns)
    return ExpertPart(part.key, part.item, part.expert, rows, columns, part.is_turned)


def _window(tensor: Tensor, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, shape, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def check_finite(tensor: Tensor, source: str) -> None:
    """Refuse a tensor, called `source` in the message, with values that are not finite.

    Raises:
        CheckpointError: it holds some.
    """
    # The extremes, which NaN and infinity pass through, need no memory; `isfinite` needs copies.
    if tensor.numel() == 0 or all(value.isfinite() for value in torch.aminmax(tensor)):
        return
    num_bad = tensor.numel() - int(tensor.isfinite().sum())
    noun = "value" if num_bad == 1 else "values"
    raise CheckpointError(f"{source} holds {num_bad} non-finite {noun}")
