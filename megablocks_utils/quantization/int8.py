"""INT8: whole numbers from -127 to 127 times a scale for every 256 inputs of an output."""

import math

import torch
from torch import Tensor

from megablocks_utils.quantization.code_book import pad_columns
from megablocks_utils.quantization.weight_format import (
    MatrixCut,
    PartLayout,
    Parts,
    cut_parts,
)

__all__ = ["Int8"]

_BLOCK, _LARGEST = 256, 127


class Int8:
    """See the module."""

    name = "int8"
    block = (1, _BLOCK)

    def describe_parts(self, num_rows: int, num_columns: int) -> dict[str, PartLayout]:
        """Return what the parts of one matrix are."""
        blocks = math.ceil(num_columns / _BLOCK)
        return {
            "codes": PartLayout((num_rows, num_columns), torch.int8, (1, 1)),
            "scales": PartLayout((num_rows, blocks), torch.float32, self.block),
        }

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the parts of a matrix (out, in), fp32."""
        blocks = pad_columns(matrix, _BLOCK).unflatten(-1, (-1, _BLOCK))
        scales = blocks.abs().amax(dim=-1) / _LARGEST
        shares = blocks / scales.where(scales > 0, 1.0)[..., None]
        codes = shares.round().clamp_(-_LARGEST, _LARGEST).to(torch.int8).flatten(-2)
        return {"codes": codes[:, : matrix.shape[1]], "scales": scales}

    def cut(self, parts: Parts, cut: MatrixCut) -> dict[str, Tensor]:
        """Return the parts of some rows and columns of a packed matrix."""
        return cut_parts(self.describe_parts(cut.num_rows, cut.num_columns), parts, cut)

    def read_codes(self, codes: Tensor) -> Tensor:
        """Return the numbers (n, rows, columns), unscaled, in fp32."""
        return codes.float()

    def build_scales(self, parts: Parts) -> Tensor:
        """Return the scale of each block (n, out, blocks) in fp32; every part has n in front."""
        return parts["scales"]
