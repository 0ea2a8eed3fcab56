"""What a format of packed weights is: how matrices are packed, unpacked, and what they take.

Blocks lie within one expert, along the inputs of a projection, so that no shard cuts one.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["PartLayout", "Parts", "WeightFormat"]

Parts = Mapping[str, Tensor]
"""The tensors that a packed weight consists of, by name."""


class PartLayout(NamedTuple):
    """Shape, of one expert's matrix, and dtype of a part."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFormat(Protocol):
    """Pack matrices (out, in) of finite numbers into few bits."""

    @property
    def name(self) -> str:
        """As `--expert_quantization` has it."""
        ...

    def describe_parts(self, num_rows: int, num_columns: int) -> dict[str, PartLayout]:
        """Return what the parts of one matrix are."""
        ...

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the parts of a matrix (out, in), fp32."""
        ...

    def unpack(self, parts: Parts, num_columns: int) -> Tensor:
        """Return matrices (n, out, in) in fp32; every part has n in front."""
        ...
