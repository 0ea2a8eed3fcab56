"""What a format of packed weights is: how matrices are packed, unpacked, and what they take.

Blocks lie within one expert, along the inputs of a projection, so that no shard of experts cuts
one. Of a matrix a rank may hold some rows and columns alone; they are cut from the packed matrix,
so that the numbers that they stand for are the same on every layout.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "CodedFormat",
    "MatrixCut",
    "PartLayout",
    "Parts",
    "WeightFormat",
    "cut_parts",
    "find_shared_parts",
    "join_rows",
    "keep_parts",
    "unpack",
    "unpack_rows",
]

Parts = Mapping[str, Tensor]
"""The tensors that a packed weight consists of, by name."""


class PartLayout(NamedTuple):
    """Shape, of one expert's matrix, and dtype of a part.

    `covers` is how many rows and columns of the matrix an element is for, or None for what is of
    the matrix as a whole. A part with one dim has the elements row by row.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    covers: tuple[int, int] | None


class MatrixCut(NamedTuple):
    """Which rows and columns of a matrix (out, in) a rank computes with, in whole blocks.

    Attributes:
        rows: in the order in which they lie.
        columns: likewise.
        num_rows: of the whole matrix.
        num_columns: likewise.
        shard: which of equal shards of these rows is kept, until they are gathered.
        num_shards: how many there are.
    """

    rows: Sequence[range]
    columns: range
    num_rows: int
    num_columns: int
    shard: int = 0
    num_shards: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole matrix, kept in one or in shards."""
        sizes = sum(map(len, self.rows)), len(self.columns)
        return sizes == (self.num_rows, self.num_columns)


class WeightFormat(Protocol):
    """Pack matrices (out, in) of finite numbers into few bits."""

    @property
    def name(self) -> str:
        """As `--expert_quantization` has it."""
        ...

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block: neither a cut nor a shard goes through one."""
        ...

    def describe_parts(self, num_rows: int, num_columns: int) -> dict[str, PartLayout]:
        """Return what the parts of one matrix are."""
        ...

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the parts of a matrix (out, in), fp32."""
        ...

    def cut(self, parts: Parts, cut: MatrixCut) -> dict[str, Tensor]:
        """Return the parts of some rows and columns of a packed matrix."""
        ...

    def build_scales(self, parts: Parts) -> Tensor:
        """Return the scale of each block (n, blocks of rows, blocks of columns) in fp32.

        Every part has n in front.
        """
        ...

    def read_codes(self, codes: Tensor) -> Tensor:
        """Return the numbers (n, rows, columns or more), unscaled, of `parts["codes"]` in fp32.

        They have memory of their own.
        """
        ...


@runtime_checkable
class CodedFormat(WeightFormat, Protocol):
    """A format of 4-bit codes: a weight is its code's entry of a table, times its block's scale.

    `parts["codes"]` has two inputs of an output in each byte.
    """

    @property
    def table(self) -> Tensor:
        """The 16 numbers that codes stand for, fp32 on the CPU."""
        ...

    @property
    def first_is_high(self) -> bool:
        """Whether the first of a byte's two codes is in its upper bits."""
        ...


def unpack(weight_format: WeightFormat, parts: Parts, num_columns: int) -> Tensor:
    """Return matrices (n, out, in) in fp32; every part has n in front."""
    return unpack_rows(
        weight_format, parts["codes"], weight_format.build_scales(parts), num_columns
    )


def unpack_rows(
    weight_format: WeightFormat, codes: Tensor, scales: Tensor, num_columns: int
) -> Tensor:
    """Return rows (n, rows, in) of matrices in fp32, in memory of their own.

    Args:
        weight_format: what they are packed in.
        codes: `parts["codes"]` of these rows, which begin and, but for the matrix's last, end with
            a block.
        scales: of these blocks, of `build_scales`.
        num_columns: in.
    """
    high, wide = weight_format.block
    numbers = weight_format.read_codes(codes)
    if high > 1:
        scales = scales.repeat_interleave(high, dim=1)[:, : numbers.shape[1]]
    whole, rest = divmod(numbers.shape[-1], wide)
    in_blocks = numbers[..., : whole * wide].unflatten(-1, (whole, wide))
    in_blocks.mul_(scales[..., :whole, None])
    if rest:
        numbers[..., whole * wide :].mul_(scales[..., whole:])
    return numbers[..., :num_columns]


def keep_parts(weight_format: WeightFormat, parts: Parts, cut: MatrixCut) -> dict[str, Tensor]:
    """Return of a packed matrix what a rank keeps: a cut, and of that a shard of the rows."""
    chosen = weight_format.cut(parts, cut)
    if cut.num_shards == 1:
        return chosen
    shared = find_shared_parts(weight_format)
    return {
        name: part if name in shared else part.chunk(cut.num_shards)[cut.shard]
        for name, part in chosen.items()
    }


def find_shared_parts(weight_format: WeightFormat) -> set[str]:
    """Return the parts that are of a matrix as a whole, which every shard of it has."""
    layouts = weight_format.describe_parts(*weight_format.block)
    return {name for name, layout in layouts.items() if layout.covers is None}


def join_rows(gathered: Tensor, num_shards: int, is_shared: bool) -> Tensor:
    """Return a part (L, ...) of what ranks have of it one after the other (ranks * L, rows, ...).

    Of what all of them have whole, the first one's.
    """
    by_rank = gathered.unflatten(0, (num_shards, -1))
    return by_rank[0] if is_shared else by_rank.transpose(0, 1).flatten(1, 2)


def cut_parts(layouts: Mapping[str, PartLayout], parts: Parts, cut: MatrixCut) -> dict[str, Tensor]:
    """Cut every part that is not of the matrix as a whole; these stay as they are."""
    return {name: _cut_part(part, layouts[name].covers, cut) for name, part in parts.items()}


def _cut_part(part: Tensor, covers: tuple[int, int] | None, cut: MatrixCut) -> Tensor:
    if covers is None:
        return part
    high, wide = covers
    grid = part.reshape(math.ceil(cut.num_rows / high), -1)
    rows = [grid[run.start // high : math.ceil(run.stop / high)] for run in cut.rows]
    columns = slice(cut.columns.start // wide, math.ceil(cut.columns.stop / wide))
    chosen = torch.cat(rows)
    # The last block of a row may be filled up with zeros.
    if cut.columns.stop < cut.num_columns or cut.columns.start:
        chosen = chosen[:, columns]
    return chosen.flatten() if part.dim() == 1 else chosen.contiguous()
