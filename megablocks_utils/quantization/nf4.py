"""NF4 with double quantization, as QLoRA (Dettmers et al., arXiv 2305.14314) and bitsandbytes.

Blocks of 64 numbers are divided by their largest magnitude, and each becomes the nearest of 16
quantiles of the normal distribution. The magnitudes, less their mean in the matrix, are stored in
8 bits in blocks of 256. Where the inputs are a multiple of 64, that is what
`quantize_4bit(..., compress_statistics=True)` of bitsandbytes 0.50 makes of each expert, but for
rounding where two codes are as near: small matrices were bit-equal, of 768 x 2048 numbers a few
4-bit codes in one draw of two, and 40 of 24,576 8-bit codes (in those looked at ours is nearer).
"""

import math

import torch
from torch import Tensor

from megablocks_utils.quantization.code_book import (
    find_nearest,
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

__all__ = ["NF4_VALUES", "Nf4"]

_BLOCK, _SCALE_BLOCK = 64, 256
_EXPONENTS = 7

# Appendix E of the paper.
NF4_VALUES = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def build_dynamic_table() -> Tensor:
    """Return the 256 values of bitsandbytes' dynamic 8-bit data type (arXiv 2110.02861)."""
    values = [0.0, 1.0]
    for exponent in range(_EXPONENTS):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / 2.0
        size = 10 ** (exponent + 1 - _EXPONENTS)
        values += (size * means).tolist() + (-size * means).tolist()
    return torch.tensor(sorted(values))


_DYNAMIC_VALUES = build_dynamic_table()


class Nf4:
    """See the module."""

    name = "nf4"
    block = (1, _BLOCK)
    table = NF4_VALUES
    first_is_high = True

    def describe_parts(self, num_rows: int, num_columns: int) -> dict[str, PartLayout]:
        """Return what the parts of one matrix are."""
        blocks = math.ceil(num_columns / _BLOCK)
        num_scales = num_rows * blocks
        return {
            "codes": PartLayout((num_rows, blocks * _BLOCK // 2), torch.uint8, (1, 2)),
            "scale_codes": PartLayout((num_scales,), torch.uint8, self.block),
            "scale_scales": PartLayout(
                (math.ceil(num_scales / _SCALE_BLOCK),), torch.float32, None
            ),
            "scale_mean": PartLayout((1,), torch.float32, None),
        }

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the parts of a matrix (out, in), fp32."""
        blocks = pad_columns(matrix, _BLOCK).reshape(-1, _BLOCK)
        scales = blocks.abs().amax(dim=1)
        divisors = scales.where(scales > 0, 1.0)[:, None]
        codes = find_nearest(blocks / divisors, NF4_VALUES.to(matrix.device))
        mean = scales.mean()
        rests = pad_columns((scales - mean)[None], _SCALE_BLOCK).reshape(-1, _SCALE_BLOCK)
        scale_scales = rests.abs().amax(dim=1)
        shares = rests / scale_scales.where(scale_scales > 0, 1.0)[:, None]
        scale_codes = find_nearest(shares, _DYNAMIC_VALUES.to(matrix.device))
        return {
            "codes": join_nibbles(codes, first_is_high=self.first_is_high).reshape(len(matrix), -1),
            "scale_codes": scale_codes.flatten()[: len(scales)],
            "scale_scales": scale_scales,
            "scale_mean": mean[None],
        }

    def cut(self, parts: Parts, cut: MatrixCut) -> dict[str, Tensor]:
        """Return the parts of some rows and columns of a packed matrix.

        Blocks of scales go from row to row. They stay whole, and `scale_starts` says where the
        first scale of each row lies in them.
        """
        chosen = cut_parts(self.describe_parts(cut.num_rows, cut.num_columns), parts, cut)
        if cut.is_whole:
            return chosen
        rows = torch.cat([torch.arange(run.start, run.stop) for run in cut.rows])
        starts = rows * math.ceil(cut.num_columns / _BLOCK) + cut.columns.start // _BLOCK
        return {**chosen, "scale_starts": starts.to(parts["codes"].device, torch.int32)}

    def read_codes(self, codes: Tensor) -> Tensor:
        """Return the numbers (n, rows, columns or more), unscaled, in fp32."""
        return look_up_nibbles(codes, self.table, first_is_high=self.first_is_high)

    def build_scales(self, parts: Parts) -> Tensor:
        """Return the scale of each block (n, out, blocks) in fp32; every part has n in front."""
        scales = look_up(parts["scale_codes"], _DYNAMIC_VALUES)
        scales = scales * _spread_scale_scales(parts) + parts["scale_mean"]
        return scales.unflatten(1, (parts["codes"].shape[1], -1))


def _spread_scale_scales(parts: Parts) -> Tensor:
    """Return the scale of each 8-bit scale (n, scales)."""
    scale_scales, num_scales = parts["scale_scales"], parts["scale_codes"].shape[1]
    starts = parts.get("scale_starts")
    if starts is None:
        return scale_scales.repeat_interleave(_SCALE_BLOCK, dim=1)[:, :num_scales]
    in_row = torch.arange(num_scales // starts.shape[1], device=starts.device)
    places = (starts[..., None] + in_row).flatten(1) // _SCALE_BLOCK
    return scale_scales.gather(1, places.long())
