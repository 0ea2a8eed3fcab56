"""The experts' matrices that rows are multiplied by, and how a kernel loads them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megablocks_utils.kernels.fused.tile import Tile
from megablocks_utils.kernels.fused.weight_tile import WeightLoad
from megablocks_utils.quantization.code_book import put_beside
from megablocks_utils.quantization.format_table import FORMATS
from megablocks_utils.quantization.packed_experts import PackedExperts
from megablocks_utils.quantization.weight_format import CodedFormat

__all__ = ["AnyMatrix", "CodedMatrix", "Matrix", "build_matrix"]


@dataclass(frozen=True)
class Matrix:
    """A matrix (rows, columns) of each expert, as a view of stored weights: `row @ matrix`.

    Attributes:
        tensor: (L, a, b), any strides.
        rows_are_last: whether its rows run along the last dim of `tensor`.
    """

    tensor: Tensor
    rows_are_last: bool

    @property
    def num_rows(self) -> int:
        """Length of what is multiplied with a column."""
        return self.tensor.shape[2 if self.rows_are_last else 1]

    @property
    def num_cols(self) -> int:
        """Length of a result."""
        return self.tensor.shape[1 if self.rows_are_last else 2]

    @property
    def strides(self) -> tuple[int, int, int]:
        """Elements from one expert, column and row to the next."""
        expert, middle, last = self.tensor.stride()
        return (expert, middle, last) if self.rows_are_last else (expert, last, middle)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.tensor.device

    @property
    def transposed(self) -> "Matrix":
        """The matrix of the backward pass: `row @ matrix.T`."""
        return replace(self, rows_are_last=not self.rows_are_last)

    def uses_tma(self, tile: Tile) -> bool:
        """Say whether TMA may and can load tiles of it: whole boxes along the rows, even lines."""
        return (
            tile.uses_tma
            and self.tensor.is_contiguous()
            and self.num_rows % tile.block_k == 0
            and self.tensor.shape[2] * self.tensor.element_size() % 16 == 0
            and self.tensor.data_ptr() % 16 == 0
        )

    def argument(self, tile: Tile) -> Tensor | TensorDescriptor:
        """Return what the kernel loads weights by: a descriptor of boxes, or the tensor."""
        if not self.uses_tma(tile):
            return self.tensor
        box = [tile.block_n, tile.block_k]
        if not self.rows_are_last:
            box.reverse()
        return TensorDescriptor.from_tensor(self.tensor.flatten(0, 1), box)

    def load(self, tile: Tile) -> WeightLoad:
        """Return how its tiles are loaded."""
        is_even = self.num_rows % tile.block_k == 0
        return WeightLoad(is_even, self.rows_are_last, self.uses_tma(tile))


@dataclass(frozen=True)
class CodedMatrix:
    """The same of frozen weights in codes of 4 bits, which the kernel looks up as it loads them.

    Attributes:
        codes: (L or more, out, bytes), two inputs in each.
        scales: (L, out, blocks) fp32.
        table: (16,) fp32, what the codes stand for.
        block: inputs that share a scale.
        high_is_first: whether the first of a byte's two codes is in its upper bits.
        sizes: outputs and inputs of a projection.
        rows_are_last: whether the matrix's rows run along the inputs.
    """

    codes: Tensor
    scales: Tensor
    table: Tensor
    block: int
    high_is_first: bool
    sizes: tuple[int, int]
    rows_are_last: bool = True

    @property
    def num_rows(self) -> int:
        """Length of what is multiplied with a column."""
        return self.sizes[1 if self.rows_are_last else 0]

    @property
    def num_cols(self) -> int:
        """Length of a result."""
        return self.sizes[0 if self.rows_are_last else 1]

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """From one expert and output to the next: bytes of codes, then scales."""
        (codes, of_codes, _), (scales, of_scales, _) = self.codes.stride(), self.scales.stride()
        return codes, of_codes, scales, of_scales

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    @property
    def transposed(self) -> "CodedMatrix":
        """The matrix of the backward pass: `row @ matrix.T`."""
        return replace(self, rows_are_last=not self.rows_are_last)

    def argument(self, _tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the kernel loads and looks up weights by."""
        return self.codes, self.scales, self.table

    def load(self, tile: Tile) -> WeightLoad:
        """Return how its tiles are loaded: by no descriptor, since they are no numbers yet."""
        return WeightLoad(
            self.num_rows % tile.block_k == 0,
            self.rows_are_last,
            code_block=self.block,
            high_is_first=self.high_is_first,
        )


AnyMatrix = Matrix | CodedMatrix


def build_matrix(weight: Tensor, *, is_transposed: bool) -> AnyMatrix:
    """Return the matrices (in, out) of a projection.

    Of packed experts the blocks' scales are made here, in fp32: a sixteenth of a byte a weight for
    blocks of 64.

    Args:
        weight: (L, out, in), or (L, in, out) where transposed; or packed.
        is_transposed: see there.
    """
    if not isinstance(weight, PackedExperts):
        return Matrix(weight, rows_are_last=not is_transposed)
    weight_format = FORMATS[weight.format_name]
    assert isinstance(weight_format, CodedFormat), weight_format
    num_experts, *sizes = weight.shape
    num_out, num_in = reversed(sizes) if is_transposed else sizes
    parts = {name: part[:num_experts] for name, part in weight.parts.items()}
    return CodedMatrix(
        parts["codes"],
        weight_format.build_scales(parts),
        put_beside(parts["codes"], weight_format.table),
        weight_format.block[1],
        weight_format.first_is_high,
        (num_out, num_in),
    )
