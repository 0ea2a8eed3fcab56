"""Weights that are stored packed beside their scales, as floating-point tensors.

Each kind says where the rows asked for lie in its parts; the arithmetic is that of transformers'
own dequantizing operations, so the values are those of `from_pretrained` with `dequantize=True`.
No more than some rows of one matrix (an expert) is dequantized at a time.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import Mxfp4Dequantize

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.checkpoint.safetensors_header import TensorEntry
from megablocks_utils.errors import CheckpointError

__all__ = ["Fp8Weight", "Mxfp4Weight", "PackedWeight", "StoredPart", "meta_target"]

_MAX_VALUES = 2**21
"""Dequantized at once: 8 MiB in float32, of which the operations hold a few copies."""
_NAN_EXPONENT = 255
"""Of a scale stored as a byte that is its power of two."""
_MXFP4_BLOCK, _FP8_BLOCK = 32, (128, 128)  # of the formats that experts are kept in
_FP4_DTYPES = (torch.int8, torch.float4_e2m1fn_x2)


@dataclass(frozen=True)
class StoredPart:
    """One stored tensor of a packed weight, and the name it is stored under."""

    key: str
    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape as it is stored."""
        return self.entry.shape

    def refuse_shape(self, wanted: str) -> CheckpointError:
        """Return the error that says that its shape is not the one wanted."""
        return CheckpointError(
            f"{self.key} in {self.entry.path} has shape {self.shape}, wanted is {wanted}"
        )

    def check_finite(self, scales: Tensor) -> Tensor:
        """Return some of its values, which are scales, having seen that they are finite."""
        is_bad = scales == _NAN_EXPONENT if _is_exponent(scales) else ~scales.float().isfinite()
        if num_bad := int(is_bad.sum()):
            noun = "value" if num_bad == 1 else "values"
            raise CheckpointError(
                f"{self.key} in {self.entry.path} holds {num_bad} non-finite {noun}"
            )
        return scales


class PackedWeight(ABC):
    """A matrix (rows, columns), or one for each of E experts, that is dequantized when it is read.

    Attributes:
        shape: of the floating-point tensor, (rows, columns) or (E, rows, columns).
        dtype: that it is read in.
    """

    def __init__(self, values: StoredPart, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.values = values
        self.shape = shape
        self.dtype = dtype

    @property
    def path(self) -> Path:
        """Return the file that holds the packed values."""
        return self.values.entry.path

    @property
    def num_bytes(self) -> int:
        """Return the size of the floating-point tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def keeps_format(self, name: str) -> bool:
        """Return whether it is stored as `--expert_quantization` of that name packs matrices."""
        return False

    def read_parts(self, item: int | None) -> dict[str, Tensor]:
        """Return the parts of a matrix, or of element `item`, as that format has them: (out, in).

        Raises:
            CheckpointError: a number is not finite, or a file is not what it was.
        """
        raise NotImplementedError(self)

    def read_bytes(self, start: int, num_bytes: int) -> bytes:
        """Return some bytes of the floating-point tensor."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        first = start // row_bytes
        rows = self.read_rows(first, math.ceil((start + num_bytes) / row_bytes))
        skipped = start - first * row_bytes
        flat = rows.view(-1).view(torch.uint8)[skipped : skipped + num_bytes]
        return flat.numpy().tobytes()

    def read(self) -> Tensor:
        """Return the whole floating-point tensor."""
        return self.read_rows(0, self.shape[0])

    def read_rows(self, start: int, stop: int, *, item: int | None = None) -> Tensor:
        """Return rows `start:stop`, or those of element `item` of dim 0, dequantized.

        Raises:
            CheckpointError: a scale is not finite, or a file is not what it was.
        """
        if len(self.shape) == 2 and item is not None:
            return self.read_rows(item, item + 1)[0, start:stop]
        columns = self.shape[1:] if item is None else self.shape[2:]
        result = torch.empty((stop - start, *columns), dtype=self.dtype)
        if len(self.shape) == 3 and item is None:
            for expert in range(start, stop):
                self._fill(result[expert - start], 0, expert)
        else:
            self._fill(result, start, item)
        return result

    def _fill(self, target: Tensor, first: int, item: int | None) -> None:
        """Write the rows of one matrix from `first` on into `target`, some at a time."""
        num_rows, num_columns = target.shape
        step = max(1, _MAX_VALUES // max(1, num_columns))
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            with ForeignCode(self._to_error):
                rows = self._dequantize(first + start, first + stop, item)
                target[start:stop] = rows.detach()  # some come as a parameter

    def _to_error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.values.key} in {self.path} cannot be dequantized: {reason}")

    @abstractmethod
    def _dequantize(self, start: int, stop: int, item: int | None) -> Tensor:
        """Return rows of the matrix, or of expert `item`, in `dtype`."""


class Mxfp4Weight(PackedWeight):
    """GPT-OSS: blocks (E, columns, groups, 16) of two values a byte, one exponent a group.

    What is stored as a row of `columns` is a column of the weight (E, rows, columns).
    """

    def __init__(self, blocks: StoredPart, scales: StoredPart, dtype: torch.dtype) -> None:
        if len(blocks.shape) != 4 or blocks.entry.dtype != torch.uint8:
            raise blocks.refuse_shape("(experts, columns, groups, bytes) of uint8")
        if scales.shape != blocks.shape[:-1] or scales.entry.dtype != torch.uint8:
            raise scales.refuse_shape(f"{blocks.shape[:-1]} of uint8")
        num_experts, num_columns, num_groups, num_bytes = blocks.shape
        self._group_rows = 2 * num_bytes
        self._scales = scales
        super().__init__(blocks, (num_experts, num_groups * self._group_rows, num_columns), dtype)
        self._operation = Mxfp4Dequantize(None)

    def keeps_format(self, name: str) -> bool:
        """See `PackedWeight`."""
        return name == "mxfp4" and self._group_rows == _MXFP4_BLOCK

    def read_parts(self, item: int | None) -> dict[str, Tensor]:
        """See `PackedWeight`; what is stored as a row is an output."""
        blocks = self.values.entry.read_rows(0, self.shape[2], item=item)
        scales = self._scales.entry.read_rows(0, self.shape[2], item=item)
        return {"codes": blocks.flatten(1), "exponents": self._scales.check_finite(scales)}

    def _dequantize(self, start: int, stop: int, item: int | None) -> Tensor:
        first, last = start // self._group_rows, math.ceil(stop / self._group_rows)
        num_columns = self.shape[2]
        blocks = self.values.entry.read_rows(0, num_columns, item=item)[:, first:last]
        scales = self._scales.entry.read_rows(0, num_columns, item=item)[:, first:last]
        self._scales.check_finite(scales)
        name = "down_proj"
        parts = {f"{name}_blocks": blocks[None], f"{name}_scales": scales[None]}
        model = meta_target(name, self.dtype)
        rows = self._operation.convert(parts, model=model, full_layer_name=name)[name][0]
        return rows[start - first * self._group_rows : stop - first * self._group_rows]


class Fp8Weight(PackedWeight):
    """One scale for each block of a matrix of 8-bit floats, or of two 4-bit floats a byte.

    The blocks are those that the configuration names where the scales are as many as these would
    be, the last ones cut off at the edge (as DeepSeek's kernels read them); else all are of one
    size, as many as there are scales.
    """

    def __init__(
        self,
        weight: StoredPart,
        scale: StoredPart,
        dtype: torch.dtype,
        *,
        block_size: tuple[int, int] | None,
    ) -> None:
        if len(weight.shape) not in (2, 3):
            raise weight.refuse_shape("(rows, columns), with or without experts before them")
        self._values_per_byte = 2 if weight.entry.dtype in _FP4_DTYPES else 1
        shape = (*weight.shape[:-1], weight.shape[-1] * self._values_per_byte)
        super().__init__(weight, shape, dtype)
        self._scale = scale
        self._block = self._find_block(block_size)
        self._operation = Fp8Dequantize(None)

    def keeps_format(self, name: str) -> bool:
        """See `PackedWeight`."""
        is_fp8 = self.values.entry.dtype == torch.float8_e4m3fn
        return name == "fp8" and is_fp8 and self._is_grid and self._block == _FP8_BLOCK

    def read_parts(self, item: int | None) -> dict[str, Tensor]:
        """See `PackedWeight`."""
        num_rows = self.shape[-2]
        codes = self.values.check_finite(self.values.entry.read_rows(0, num_rows, item=item))
        num_blocks = math.ceil(num_rows / self._block[0])
        scales = self._scale.check_finite(self._scale.entry.read_rows(0, num_blocks, item=item))
        if _is_exponent(scales):
            scales = scales.view(torch.float8_e8m0fnu)
        return {"codes": codes.view(torch.uint8), "scales": scales.float()}

    @property
    def _is_grid(self) -> bool:
        """Whether there is a grid of scales for each matrix, and not one scale."""
        return len(self._scale.shape) == len(self.shape)

    def _find_block(self, block_size: tuple[int, int] | None) -> tuple[int, int]:
        """Return the rows and columns that a scale is for."""
        num_rows, num_columns = self.shape[-2:]
        leading, found = self.shape[:-2], self._scale.shape
        if not self._is_grid and found in ((), (1,), leading):
            return num_rows, num_columns
        wanted = f"one scale for each block of {self.values.key}, {self.values.shape}"
        if not self._is_grid or found[:-2] != leading or 0 in found:
            raise self._scale.refuse_shape(wanted)
        if block_size is not None:
            named = [
                math.ceil(size / block)
                for size, block in zip(self.shape[-2:], block_size, strict=True)
            ]
            if tuple(named) == found[-2:]:
                return block_size
            wanted += f" in blocks of {block_size[0]} x {block_size[1]}"
        if num_rows % found[-2] or num_columns % found[-1]:
            raise self._scale.refuse_shape(wanted)
        return num_rows // found[-2], num_columns // found[-1]

    def _dequantize(self, start: int, stop: int, item: int | None) -> Tensor:
        weight = self.values.entry.read_rows(start, stop, item=item)
        scales = self._read_scales(start, stop, item)
        num_columns = self.shape[-1]
        wanted = scales.shape[1] * self._block[1]
        if wanted > num_columns:
            weight = _pad_columns(weight, (wanted - num_columns) // self._values_per_byte)
        model = meta_target("weight", self.dtype)
        parts: dict[str, list[Tensor] | Tensor] = {"weight": weight, "weight_scale_inv": scales}
        rows = self._operation.convert(parts, full_layer_name="weight", model=model)["weight"]
        assert isinstance(rows, Tensor), "one tensor gives one tensor"
        return rows[:, :num_columns]

    def _read_scales(self, start: int, stop: int, item: int | None) -> Tensor:
        """Return the scales (rows, blocks along a row) of some rows: each row has its own."""
        if not self._is_grid:
            scales = self._scale.check_finite(self._scale.entry.read()).reshape(-1)
            scale = scales[item if item is not None and len(scales) > 1 else 0]
            return scale.reshape(1, 1)
        block_rows = self._block[0]
        first = start // block_rows
        scales = self._scale.entry.read_rows(first, math.ceil(stop / block_rows), item=item)
        self._scale.check_finite(scales)
        rows = torch.arange(start, stop) // block_rows - first
        if scales.dtype.itemsize > 1:
            return scales[rows]
        return scales.view(torch.uint8)[rows].view(scales.dtype)


def meta_target(name: str, dtype: torch.dtype) -> nn.Module:
    """Return a module whose parameter of this name says what dtype is wanted, and no more."""
    module = nn.Module()
    parameter = nn.Parameter(torch.empty(0, dtype=dtype, device="meta"), requires_grad=False)
    module.register_parameter(name, parameter)
    return module


def _is_exponent(scales: Tensor) -> bool:
    return scales.dtype == torch.uint8


def _pad_columns(weight: Tensor, num_bytes: int) -> Tensor:
    """Append zeros to each row of a matrix whose elements are bytes."""
    padded = weight.new_zeros((len(weight), weight.shape[1] + num_bytes), dtype=torch.uint8)
    padded[:, : weight.shape[1]] = weight.view(torch.uint8)
    return padded.view(weight.dtype)
