"""The dtypes of weights: names and sizes in one table.

Torch-free, so that options and plans can read it; `getattr(torch, name)` is the dtype itself.
"""

from types import MappingProxyType
from typing import NamedTuple

__all__ = ["DTYPES", "PACKED_DTYPES", "Dtype", "itemsize"]


class Dtype(NamedTuple):
    """Describe a dtype.

    Attributes:
        safetensors_name: its name in the header of a safetensors file.
        itemsize: bytes of an element.
    """

    safetensors_name: str
    itemsize: int


DTYPES = MappingProxyType(
    {
        "float64": Dtype("F64", 8),
        "float32": Dtype("F32", 4),
        "float16": Dtype("F16", 2),
        "bfloat16": Dtype("BF16", 2),
        "int64": Dtype("I64", 8),
        "int32": Dtype("I32", 4),
        "int16": Dtype("I16", 2),
        "int8": Dtype("I8", 1),
        "uint8": Dtype("U8", 1),
        "bool": Dtype("BOOL", 1),
    }
)
"""Every dtype that checkpoints can hold, by torch's name."""

PACKED_DTYPES = MappingProxyType(
    {
        "float8_e4m3fn": Dtype("F8_E4M3", 1),
        "float8_e5m2": Dtype("F8_E5M2", 1),
        "float8_e8m0fnu": Dtype("F8_E8M0", 1),
        "float4_e2m1fn_x2": Dtype("F4", 1),
    }
)
"""Those of quantized weights and their scales, by torch's name; they mean nothing by themselves.

An element of torch's `float4_e2m1fn_x2` holds two of the file's.
"""


def itemsize(name: str) -> int:
    """Return the bytes of an element of the dtype that torch calls `name`."""
    return DTYPES[name].itemsize
