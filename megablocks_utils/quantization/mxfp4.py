"""MXFP4 of the OCP Microscaling specification 1.0: E2M1 numbers, a power of two for each 32.

Numbers that are stored so already, such as GPT-OSS's, come out as they went in.
"""

import math

import torch
from torch import Tensor

from megablocks_utils.quantization.code_book import (
    join_nibbles,
    look_up,
    look_up_nibbles,
    pad_columns,
)
from megablocks_utils.quantization.weight_format import (
    MatrixCut,
    PartLayout,
    Parts,
    cut_parts,
)

__all__ = ["Mxfp4"]

_BLOCK = 32
_LARGEST_EXPONENT = 2  # of E2M1
_BIAS = 127  # of E8M0
_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_VALUES = torch.cat([_MAGNITUDES, -_MAGNITUDES])
# What a byte of E8M0 stands for: looked up, since not every device raises 2 to a power exactly.
_POWERS = torch.ldexp(torch.ones(256), torch.arange(256) - _BIAS)
_MIDDLES = (_MAGNITUDES[:-1] + _MAGNITUDES[1:]) / 2


class Mxfp4:
    """See the module."""

    name = "mxfp4"
    block = (1, _BLOCK)
    table = _VALUES
    first_is_high = False

    def describe_parts(self, num_rows: int, num_columns: int) -> dict[str, PartLayout]:
        """Return what the parts of one matrix are."""
        blocks = math.ceil(num_columns / _BLOCK)
        return {
            "codes": PartLayout((num_rows, blocks * _BLOCK // 2), torch.uint8, (1, 2)),
            "exponents": PartLayout((num_rows, blocks), torch.uint8, self.block),
        }

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the parts of a matrix (out, in), fp32."""
        blocks = pad_columns(matrix, _BLOCK).unflatten(-1, (-1, _BLOCK))
        largest = blocks.abs().amax(dim=-1)
        # frexp has the mantissa in [0.5, 1): its exponent is one more than floor(log2).
        exponents = torch.frexp(largest).exponent - 1 - _LARGEST_EXPONENT
        exponents = exponents.clamp_(-_BIAS, _BIAS).where(largest > 0, -_BIAS)
        codes = _round_to_even(torch.ldexp(blocks, -exponents[..., None]))
        return {
            "codes": join_nibbles(codes.flatten(-2), first_is_high=self.first_is_high),
            "exponents": (exponents + _BIAS).to(torch.uint8),
        }

    def cut(self, parts: Parts, cut: MatrixCut) -> dict[str, Tensor]:
        """Return the parts of some rows and columns of a packed matrix."""
        return cut_parts(self.describe_parts(cut.num_rows, cut.num_columns), parts, cut)

    def read_codes(self, codes: Tensor) -> Tensor:
        """Return the numbers (n, rows, columns or more), unscaled, in fp32."""
        return look_up_nibbles(codes, self.table, first_is_high=self.first_is_high)

    def build_scales(self, parts: Parts) -> Tensor:
        """Return the scale of each block (n, out, blocks) in fp32; every part has n in front."""
        return look_up(parts["exponents"], _POWERS)


def _round_to_even(shares: Tensor) -> Tensor:
    """Return the code of the nearest E2M1 number, or the even one of two; 6 beyond."""
    middles = _MIDDLES.to(shares.device)
    magnitudes = shares.abs()
    lower = torch.bucketize(magnitudes, middles)
    upper = torch.bucketize(magnitudes, middles, right=True)
    codes = torch.where(lower % 2 == 0, lower, upper)
    return (codes + 8 * torch.signbit(shares)).to(torch.uint8)
