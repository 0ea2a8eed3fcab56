"""FP8: E4M3 numbers with a scale for each block of 128 x 128, as DeepSeek-V3 publishes weights."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from megablocks_utils.quantization.code_book import look_up
from megablocks_utils.quantization.weight_format import (
    MatrixCut,
    PartLayout,
    Parts,
    cut_parts,
)

__all__ = ["Fp8"]

_BLOCK = 128
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
# Looked up: torch's conversion on a CPU takes 20 times as long.
_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


class Fp8:
    """See the module."""

    name = "fp8"
    block = (_BLOCK, _BLOCK)

    def describe_parts(self, num_rows: int, num_columns: int) -> dict[str, PartLayout]:
        """Return what the parts of one matrix are."""
        blocks = math.ceil(num_rows / _BLOCK), math.ceil(num_columns / _BLOCK)
        return {
            "codes": PartLayout((num_rows, num_columns), torch.uint8, (1, 1)),
            "scales": PartLayout(blocks, torch.float32, self.block),
        }

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the parts of a matrix (out, in), fp32."""
        num_rows, num_columns = matrix.shape
        padded = pad(matrix, (0, -num_columns % _BLOCK, 0, -num_rows % _BLOCK))
        blocks = padded.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))
        scales = blocks.abs().amax(dim=(1, 3)) / _LARGEST
        shares = matrix / _spread(scales.where(scales > 0, 1.0), num_rows, num_columns)
        # A quotient may round to more than the largest number, which would become NaN.
        codes = shares.clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return {"codes": codes.view(torch.uint8), "scales": scales}

    def cut(self, parts: Parts, cut: MatrixCut) -> dict[str, Tensor]:
        """Return the parts of some rows and columns of a packed matrix."""
        return cut_parts(self.describe_parts(cut.num_rows, cut.num_columns), parts, cut)

    def read_codes(self, codes: Tensor) -> Tensor:
        """Return the numbers (n, rows, columns), unscaled, in fp32."""
        return look_up(codes, _VALUES)

    def build_scales(self, parts: Parts) -> Tensor:
        """Return the scale of each block of rows and columns in fp32; every part has n in front."""
        return parts["scales"]


def _spread(scales: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Return each element's scale (..., out, in)."""
    by_row = scales.repeat_interleave(_BLOCK, dim=-2)[..., :num_rows, :]
    return by_row.repeat_interleave(_BLOCK, dim=-1)[..., :num_columns]
