"""Every format that experts can be kept in."""

from types import MappingProxyType

from torch import Tensor

from megablocks_utils.quantization.fp8 import Fp8
from megablocks_utils.quantization.int8 import Int8
from megablocks_utils.quantization.mxfp4 import Mxfp4
from megablocks_utils.quantization.nf4 import Nf4
from megablocks_utils.quantization.weight_format import WeightFormat, unpack

__all__ = ["FORMATS", "round_to_format"]

_ALL: tuple[WeightFormat, ...] = (Nf4(), Int8(), Fp8(), Mxfp4())
FORMATS = MappingProxyType({weight_format.name: weight_format for weight_format in _ALL})
"""By the name that `--expert_quantization` has."""


def round_to_format(matrix: Tensor, weight_format: WeightFormat) -> Tensor:
    """Pack a matrix (out, in) and unpack it: the numbers that are computed with, in fp32."""
    parts = weight_format.pack(matrix.float())
    return unpack(weight_format, {n: p[None] for n, p in parts.items()}, matrix.shape[1])[0]
