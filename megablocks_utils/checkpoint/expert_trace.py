"""Find out where the parts of an expert weight go, by sending numbers through transformers.

Small stand-ins with numbered elements take the place of the stored tensors in transformers' own
conversion. Where a number arrives says which expert, rows and columns its stored element is, and
whether the stored matrix is turned or interleaved. Done once for each distinct form, not for each
layer; no weight is read.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megablocks_utils.errors import CheckpointError

__all__ = ["ExpertPart", "Span", "assemble", "trace_parts"]

_ROWS, _COLUMNS = 4, 6
"""Of a stand-in's matrix: different, so that a turned one shows; even, so that halves do."""


@dataclass(frozen=True)
class Span:
    """Say where a range of stored rows (or columns) goes: both with a step, of equal length."""

    stored: range
    memory: range


@dataclass(frozen=True)
class ExpertPart:
    """Say what a block of a stored tensor is in an in-memory expert weight (E, rows, columns).

    Attributes:
        key: the stored tensor.
        item: which element of its dim 0 holds this expert; None where the tensor is of one expert.
        expert: which expert, by global index.
        rows: of the expert in memory; of the stored matrix the rows too, or with `is_turned` the
            columns.
        columns: the other dim; one column for a bias.
        is_turned: whether the stored matrix is (columns, rows).
    """

    key: str
    item: int | None
    expert: int
    rows: Span
    columns: Span
    is_turned: bool

    def stored_block(self, matrix: Tensor) -> Tensor:
        """Return this part of the stored `matrix` as it lies in memory, a view (rows, columns)."""
        if matrix.dim() == 1:
            matrix = matrix[:, None]
        matrix = matrix.T if self.is_turned else matrix
        return matrix[_as_slice(self.rows.stored), _as_slice(self.columns.stored)]

    def memory_block(self, matrix: Tensor) -> Tensor:
        """Return this part of an expert's `matrix` in memory, a view (rows, columns)."""
        if matrix.dim() == 1:
            matrix = matrix[:, None]
        return matrix[_as_slice(self.rows.memory), _as_slice(self.columns.memory)]


Convert = Callable[[Mapping[str, Tensor]], Tensor]
"""Make a parameter from stand-ins of its stored tensors, by key."""


def trace_parts(
    convert: Convert, stored: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]
) -> list[ExpertPart]:
    """Return the parts of an expert weight, by expert.

    Args:
        convert: transformers' conversion, which takes stand-ins for the stored tensors.
        stored: shapes of the stored tensors by key, in the order in which they are collected.
        shape: of the parameter in memory, (E, rows, columns) or a bias (E, rows).

    Raises:
        CheckpointError: an element of the parameter has no place in what is stored, or the
            conversion does more than to put rows and columns in place.
    """
    stand_ins, first = {}, 0
    for key, real in stored.items():
        form = _stand_in_form(real)
        stand_ins[key] = torch.arange(first, first + form.numel()).view(form)
        first += form.numel()
    converted = convert(stand_ins)
    place = torch.full((first,), -1)
    place[converted.flatten()] = torch.arange(converted.numel())
    parts = [
        part
        for key, stand_in in stand_ins.items()
        for part in _parts_of_tensor(key, place[stand_in], tuple(converted.shape), stored[key])
    ]
    _check_cover(parts, shape)
    return sorted(parts, key=lambda part: part.expert)


def assemble(parts: Sequence[ExpertPart], tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a stored tensor made of the parts that an expert weight holds of it."""
    first = parts[0]
    if len(parts) == 1 and first.item is None:
        block = first.memory_block(tensor[first.expert])
        block = block.T if first.is_turned else block
        if block.numel() == math.prod(shape):
            return block.reshape(shape)
    whole = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    for part in parts:
        matrix = whole if part.item is None else whole[part.item]
        part.stored_block(matrix).copy_(part.memory_block(tensor[part.expert]))
    return whole


def _stand_in_form(shape: tuple[int, ...]) -> torch.Size:
    forms = {1: (_ROWS,), 2: (_ROWS, _COLUMNS)}
    return torch.Size(forms.get(len(shape), (shape[0], _ROWS, _COLUMNS)))


def _parts_of_tensor(
    key: str, place: Tensor, form: tuple[int, ...], real: tuple[int, ...]
) -> Iterator[ExpertPart]:
    """Yield the parts of one stored tensor, whose stand-in's elements are at `place` in memory."""
    if (place < 0).all():
        return  # of another target of the same converter
    items: Sequence[tuple[int | None, Tensor]] = [(None, place)]
    if place.dim() == len(form):
        items, real = list(enumerate(place)), real[1:]
    for item, matrix in items:
        rows_and_columns = (real[0], real[1] if len(real) == 2 else 1)
        yield from _parts_of_matrix(key, item, matrix.reshape(_ROWS, -1), form, rows_and_columns)


def _parts_of_matrix(
    key: str, item: int | None, place: Tensor, form: tuple[int, ...], real: tuple[int, int]
) -> Iterator[ExpertPart]:
    num_rows, num_columns = (*form[1:], 1)[:2]
    expert = place // (num_rows * num_columns)
    row, column = place // num_columns % num_rows, place % num_columns
    is_turned = bool((row[:, 0] == row[0, 0]).all()) and place.shape[1] > 1
    if is_turned:
        row, column, real = row.T, column.T, (real[1], real[0])
    separable = (row == row[:, :1]).all() and (column == column[:1]).all()
    if (place < 0).any() or (expert != expert[0, 0]).any() or not separable:
        raise CheckpointError(f"{key} holds more than whole rows of one expert")
    for rows in _spans(row[:, 0].tolist(), real[0]):
        for columns in _spans(column[0].tolist(), real[1]):
            yield ExpertPart(key, item, int(expert[0, 0]), rows, columns, is_turned)


def _spans(places: list[int], real: int) -> Iterator[Span]:
    """Yield where `real` stored rows go, if as many stand-in rows as `places` go there.

    The rows go to consecutive places, or every second to one range and the others to another, or to
    every second place.
    """
    if len(places) == 1:
        yield Span(range(real), range(places[0], places[0] + real))
        return
    for stride in (1, 2):
        runs = [places[start::stride] for start in range(stride)]
        steps = {after - before for run in runs for before, after in pairwise(run)}
        if len(steps) != 1 or not steps <= {1, 2} or real % stride:
            continue
        (step,) = steps
        count = real // stride
        for start, run in enumerate(runs):
            base, left = divmod(run[0] // step * step * real, len(places))
            if left:
                break
            base += run[0] % step
            yield Span(range(start, real, stride), range(base, base + count * step, step))
        else:
            return
    raise CheckpointError(f"its rows go to {places}")


def _check_cover(parts: Sequence[ExpertPart], shape: tuple[int, ...]) -> None:
    """Refuse parts that are not all of a weight, by the number of elements."""
    num_rows, num_columns = (*shape[1:], 1)[:2]
    sizes = [0] * shape[0]
    for part in parts:
        is_inside = part.rows.memory[-1] < num_rows and part.columns.memory[-1] < num_columns
        if part.expert >= shape[0] or not is_inside:
            raise CheckpointError(f"{part.key} goes beyond the shape {shape} in memory")
        sizes[part.expert] += len(part.rows.memory) * len(part.columns.memory)
    for expert, size in enumerate(sizes):
        if size != num_rows * num_columns:
            raise CheckpointError(f"expert {expert} of {shape[0]} is not all there")


def _as_slice(span: range) -> slice:
    return slice(span.start, span.stop, span.step)
