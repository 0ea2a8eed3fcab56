"""The weights of some experts in few bits: a tensor of which only the parts are in memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megablocks_utils.quantization.format_table import FORMATS
from megablocks_utils.quantization.weight_format import Parts

__all__ = ["PackedExperts", "list_stored"]

_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.alias.default, _aten.view.default)
# Values that are unpacked at a time: their fp32 copies are small beside the result.
_CHUNK = 2**22


class PackedExperts(Tensor):
    """Experts (L, out, in), or (L, in, out) where transposed, that must be dequantized for use.

    Shape, dtype and device are those of the weights that it stands for; no operator computes with
    it, so that none makes the whole weights without being asked to.

    Attributes:
        parts: what is in memory, by name, each with L in front.
        format_name: of the format that they are in.
        is_transposed: whether the weights stand for (L, in, out).
    """

    parts: dict[str, Tensor]
    format_name: str
    is_transposed: bool

    @staticmethod
    def __new__(
        cls,
        parts: Parts,
        format_name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        is_transposed: bool,
    ) -> "PackedExperts":
        """Take the parts as they are."""
        device = next(iter(parts.values())).device
        packed = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        packed.parts = dict(parts)
        packed.format_name = format_name
        packed.is_transposed = is_transposed
        return packed

    @classmethod
    def empty(
        cls,
        format_name: str,
        like: Tensor,
        *,
        device: torch.device,
        is_transposed: bool,
    ) -> "PackedExperts":
        """Allocate the parts of weights of the shape and dtype of `like`."""
        num_experts, *sizes = like.shape
        num_rows, num_columns = sizes[::-1] if is_transposed else sizes
        layouts = FORMATS[format_name].describe_parts(num_rows, num_columns)
        parts = {
            name: torch.zeros((num_experts, *layout.shape), dtype=layout.dtype, device=device)
            for name, layout in layouts.items()
        }
        return cls(parts, format_name, like.shape, like.dtype, is_transposed=is_transposed)

    def __init__(self, *_: object, **__: object) -> None:
        """Everything is done in `__new__`."""

    def pack_expert(self, number: int, matrix: Tensor) -> None:
        """Put an expert's weights, of the shape that they have in this tensor, in their place."""
        matrix = matrix.T if self.is_transposed else matrix
        for name, part in FORMATS[self.format_name].pack(matrix.float().contiguous()).items():
            self.parts[name][number].copy_(part)

    def in_dtype(self, dtype: torch.dtype) -> "PackedExperts":
        """Return the same experts, to be dequantized in another dtype; nothing is copied."""
        return self._rebuild(self.parts, dtype)

    def dequantize_some(self, first: int, stop: int) -> Tensor:
        """Return the weights of experts from `first` to before `stop`, contiguous."""
        made = torch.empty((stop - first, *self.shape[1:]), dtype=self.dtype, device=self.device)
        num_columns = self.shape[1 if self.is_transposed else 2]
        step = max(1, _CHUNK // (self.shape[1] * self.shape[2]))
        for start in range(first, stop, step):
            end = min(start + step, stop)
            parts = {name: part[start:end] for name, part in self.parts.items()}
            values = FORMATS[self.format_name].unpack(parts, num_columns)
            made[start - first : end - first] = values.mT if self.is_transposed else values
        return made

    def _rebuild(self, parts: Parts, dtype: torch.dtype) -> "PackedExperts":
        return PackedExperts(
            parts, self.format_name, self.shape, dtype, is_transposed=self.is_transposed
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # untyped
        """Say shape and format."""
        return f"PackedExperts({tuple(self.shape)}, {self.dtype}, {self.format_name})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub lacks `func`
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the same experts for what changes nothing, and refuse everything else."""
        packed = args[0]
        is_same = func in _SAME and isinstance(packed, PackedExperts)
        if not is_same or (func is _aten.view.default and list(args[1]) != list(packed.shape)):
            raise NotImplementedError(f"{func} of packed experts; dequantize them first")
        return packed._rebuild(packed.parts, packed.dtype)


def list_stored(tensor: Tensor) -> list[Tensor]:
    """Return what of a tensor is in memory: the parts of a packed one, else itself."""
    return list(tensor.parts.values()) if isinstance(tensor, PackedExperts) else [tensor]
