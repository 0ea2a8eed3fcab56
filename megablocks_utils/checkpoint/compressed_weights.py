"""Weights that compressed-tensors has packed (Kimi's INT4, and its 8-bit and MX forms).

Nothing here imports its package, which is optional: its configuration and its arithmetic come
through transformers' quantizer.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from transformers.integrations.compressed_tensors import CompressedTensorsDequantize

from megablocks_utils.checkpoint.packed_weights import PackedWeight, StoredPart, meta_target
from megablocks_utils.errors import CheckpointError

__all__ = ["COMPRESSED_PARTS", "CompressedWeight", "Scheme"]

COMPRESSED_PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    *("weight_global_scale", "weight_g_idx"),
)
"""What a module may store for its weight, by the last word of its name."""
_PACKED, _MX_PACKED = "pack-quantized", "mxfp4-pack-quantized"
_WORD_BITS = 32


class WeightArgs(Protocol):
    """What is read of compressed-tensors' QuantizationArgs."""

    num_bits: int
    type: str
    symmetric: bool
    strategy: str | None
    group_size: int | None
    block_structure: list[int] | None


class Scheme(Protocol):
    """What is read of compressed-tensors' QuantizationScheme: how a group of weights is packed."""

    targets: list[str]
    weights: WeightArgs | None
    format: str | None


class CompressedWeight(PackedWeight):
    """A matrix as compressed-tensors stores it.

    Args:
        parts: by the last word of their names; the values and the scales are there.
        scheme: how they are packed.
        storage: the scheme's format.
        dtype: that it is read in.
        operation: transformers', of this scheme.
        is_of_expert: transformers multiplies the 8-bit floats of experts in float32.
    """

    def __init__(
        self,
        parts: Mapping[str, StoredPart],
        scheme: Scheme,
        storage: str,
        dtype: torch.dtype,
        *,
        operation: CompressedTensorsDequantize,
        is_of_expert: bool,
    ) -> None:
        assert scheme.weights is not None, "a scheme of weights"
        self._parts = parts
        self._args = scheme.weights
        self._operation = operation
        self._is_packed = storage == _PACKED
        self._values_name = "weight_packed" if storage in (_PACKED, _MX_PACKED) else "weight"
        values = parts[self._values_name]
        if len(values.shape) != 2:
            raise values.refuse_shape("(rows, columns)")
        columns = values.shape[1] * (2 if storage == _MX_PACKED else 1)
        super().__init__(values, (values.shape[0], columns), dtype)
        if self._is_packed:
            self._find_columns()
        self._check_scales()
        strategy = self._args.strategy
        self._in_float32 = (
            is_of_expert
            and storage not in (_MX_PACKED, "mxfp8-quantized")
            and (self._args.type, strategy) in (("float", "tensor"), ("float", "channel"))
        )

    def _find_columns(self) -> None:
        """Find how many values a row has, by its scales where these say it."""
        args, num_rows = self._args, self.shape[0]
        scale = self._parts["weight_scale"]
        if args.strategy == "group" and args.group_size and len(scale.shape) == 2:
            num_columns = scale.shape[1] * args.group_size
        else:
            num_columns = self._stored_shape()[1]
        self.shape = (num_rows, num_columns)
        wanted = (num_rows, math.ceil(num_columns * args.num_bits / _WORD_BITS))
        if self.values.shape != wanted or self.values.entry.dtype != torch.int32:
            raise self.values.refuse_shape(f"{wanted} of int32")

    def _stored_shape(self) -> tuple[int, ...]:
        """Return what `weight_shape` says; where it is not stored, the shape that is known."""
        if "weight_shape" not in self._parts:
            return self.shape
        part = self._parts["weight_shape"]
        shape = tuple(int(size) for size in part.entry.read().reshape(-1))
        if len(shape) != 2 or shape[0] != self.shape[0]:
            raise CheckpointError(
                f"{part.key} in {part.entry.path} is {shape}, wanted is {self.shape}"
            )
        return shape

    def _check_scales(self) -> None:
        """Refuse scales that are not as many as the strategy asks for."""
        num_rows, num_columns = self.shape
        scale, block = self._parts["weight_scale"], self._block
        wanted = {
            "tensor": (1,),
            "channel": (num_rows, 1),
            "group": (num_rows, num_columns // (self._args.group_size or num_columns)),
            "block": (math.ceil(num_rows / block[0]), math.ceil(num_columns / block[1])),
        }[str(self._args.strategy)]
        if scale.shape != wanted and math.prod(scale.shape) * math.prod(wanted) != 1:
            raise scale.refuse_shape(f"{wanted}")

    @property
    def _block(self) -> tuple[int, int]:
        """Rows and columns of a block of the strategy `block`, else a row."""
        if self._args.strategy == "block" and self._args.block_structure is not None:
            rows, columns = self._args.block_structure
            return rows, columns
        return 1, self.shape[1]

    def _dequantize(self, start: int, stop: int, item: int | None) -> Tensor:
        # Zero points are packed along the rows, so many of which end with a word.
        step = _WORD_BITS if self._is_packed and not self._args.symmetric else self._block[0]
        first = start // step * step
        last = min(math.ceil(stop / step) * step, self.shape[0])
        scale = self._parts["weight_scale"]
        scales = scale.check_finite(self._read_beside("weight_scale", first, last))
        parts: dict[str, Tensor] = {
            self._values_name: self.values.entry.read_rows(first, last),
            "weight_scale": scales.float() if self._in_float32 else scales,
        }
        if self._is_packed:
            if self._stored_shape() != self.shape:
                raise CheckpointError(
                    f"{self._parts['weight_shape'].key} in {self.path} is {self._stored_shape()},"
                    f" but its scales are of {self.shape}"
                )
            parts["weight_shape"] = torch.tensor([last - first, self.shape[1]])
        if not self._args.symmetric:
            parts["weight_zero_point"] = self._read_zero_points(first, last)
        model = meta_target("weight", self.dtype)
        rows = self._operation.convert(parts, [], [], full_layer_name="weight", model=model)
        return rows["weight"][start - first : stop - first]

    def _read_beside(self, name: str, first: int, last: int) -> Tensor:
        """Read the part's values for some rows: one for each row, for a block of them, or one."""
        entry = self._parts[name].entry
        if self._args.strategy == "tensor":
            return entry.read()
        rows = self._block[0]
        return entry.read_rows(first // rows, math.ceil(last / rows))

    def _read_zero_points(self, first: int, last: int) -> Tensor:
        name = "weight_zero_point"
        if not self._is_packed or self._args.strategy == "tensor":
            return self._read_beside(name, first, last)
        bits = self._args.num_bits
        words = first * bits // _WORD_BITS, math.ceil(last * bits / _WORD_BITS)
        return self._parts[name].entry.read_rows(*words)
