"""The weights of some experts in few bits: a tensor of which only the parts are in memory."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from megablocks_utils.config.quantization import count_unpacked
from megablocks_utils.quantization.format_table import FORMATS
from megablocks_utils.quantization.weight_format import (
    MatrixCut,
    Parts,
    find_shared_parts,
    join_rows,
    keep_parts,
    unpack_rows,
)

__all__ = ["PackedExperts", "list_stored"]

_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.alias.default)
# FSDP2 keeps a flat view of its shard, and views what it has gathered in the shape that it has.
_VIEWS = (_aten.view.default, _aten.as_strided.default)
_COPIES = (_aten._to_copy.default, _aten.clone.default)


class _Gather(NamedTuple):
    """What `fsdp_pre_all_gather` hands on to `fsdp_post_all_gather`."""

    size: torch.Size
    shard: "PackedExperts"
    num_ranks: int


class PackedExperts(Tensor):
    """Experts (L, out, in), or (L, in, out) where transposed, that must be dequantized for use.

    Shape, dtype and device are those of the weights that it stands for; no operator computes with
    it, so that none makes the whole weights without being asked to. FSDP2 may shard it, by whole
    experts or by rows, and gathers its parts.

    Attributes:
        parts: what is in memory, by name, each with L in front, or more where a shard is filled up.
        format_name: of the format that they are in.
        is_transposed: whether the weights stand for (L, in, out).
        cut: which rows and columns of each matrix they are; None: all.
    """

    parts: dict[str, Tensor]
    format_name: str
    is_transposed: bool
    cut: MatrixCut | None

    @staticmethod
    def __new__(
        cls,
        parts: Parts,
        format_name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        is_transposed: bool,
        cut: MatrixCut | None = None,
    ) -> "PackedExperts":
        """Take the parts as they are."""
        device = next(iter(parts.values())).device
        packed = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        packed.parts = dict(parts)
        packed.format_name = format_name
        packed.is_transposed = is_transposed
        packed.cut = cut
        return packed

    @classmethod
    def empty(
        cls,
        format_name: str,
        like: Tensor,
        *,
        device: torch.device,
        is_transposed: bool,
        cut: MatrixCut | None = None,
        num_allocated: int | None = None,
        pin_memory: bool = False,
    ) -> "PackedExperts":
        """Allocate the parts of weights of the shape and dtype of `like`.

        Args:
            format_name: of `FORMATS`.
            like: the weights, or a tensor on meta.
            device: of the parts.
            is_transposed: whether they are (L, in, out).
            cut: which rows and columns of each matrix they are; None: all.
            num_allocated: how many experts there is room for; None: for those of `like`.
            pin_memory: whether the parts lie in pinned memory of the host.
        """
        sizes = like.shape[1:]
        num_rows, num_columns = sizes[::-1] if is_transposed else sizes
        if cut is not None:
            num_rows, num_columns = cut.num_rows, cut.num_columns
        layouts = FORMATS[format_name].describe_parts(num_rows, num_columns)
        matrix = {
            name: torch.empty(layout.shape, dtype=layout.dtype, device="meta")
            for name, layout in layouts.items()
        }
        if cut is not None:
            matrix = keep_parts(FORMATS[format_name], matrix, cut)
        count = len(like) if num_allocated is None else num_allocated
        parts = {
            name: torch.zeros(
                (count, *part.shape), dtype=part.dtype, device=device, pin_memory=pin_memory
            )
            for name, part in matrix.items()
        }
        return cls(parts, format_name, like.shape, like.dtype, is_transposed=is_transposed, cut=cut)

    def __init__(self, *_: object, **__: object) -> None:
        """Everything is done in `__new__`."""

    def pack_expert(self, number: int, matrix: Tensor) -> None:
        """Put an expert's weights in their place.

        Args:
            number: of the expert in this tensor.
            matrix: whole, whatever is kept of it, as it lies in a tensor of whole experts.
        """
        matrix = matrix.T if self.is_transposed else matrix
        self.put_expert(number, FORMATS[self.format_name].pack(matrix.float().contiguous()))

    def put_expert(self, number: int, parts: Parts) -> None:
        """Put an expert's weights in their place, of which these are the parts, whole."""
        if self.cut is not None:
            parts = keep_parts(FORMATS[self.format_name], parts, self.cut)
        for name, part in parts.items():
            self.parts[name][number].copy_(part)

    def in_dtype(self, dtype: torch.dtype) -> "PackedExperts":
        """Return the same experts, to be dequantized in another dtype; nothing is copied."""
        return self._rebuild(self.parts, dtype)

    def first(self, count: int) -> "PackedExperts":
        """Return the first of the experts; nothing is copied."""
        parts = {name: part[:count] for name, part in self.parts.items()}
        shape = (count, *self.shape[1:])
        flags = {"is_transposed": self.is_transposed, "cut": self.cut}
        return PackedExperts(parts, self.format_name, shape, self.dtype, **flags)

    def dequantize_some(self, first: int, stop: int) -> Tensor:
        """Return the weights of experts from `first` to before `stop`, contiguous."""
        assert self.cut is None or self.cut.num_shards == 1, "shards of rows are gathered first"
        made = torch.empty((stop - first, *self.shape[1:]), dtype=self.dtype, device=self.device)
        rows_first = made.mT if self.is_transposed else made
        num_rows, num_columns = rows_first.shape[1:]
        weight_format = FORMATS[self.format_name]
        high, _ = weight_format.block
        scales = weight_format.build_scales({n: p[first:stop] for n, p in self.parts.items()})
        codes = self.parts["codes"][first:stop]
        # Some small experts at a time, or some rows of a large one, in whole blocks.
        at_a_time = count_unpacked(self.device.type)
        num_experts = max(1, at_a_time // (num_rows * num_columns))
        step = max(1, at_a_time // (num_columns * high)) * high
        for expert, row in product(range(0, len(made), num_experts), range(0, num_rows, step)):
            some, rows = slice(expert, expert + num_experts), slice(row, row + step)
            blocks = slice(row // high, ceil((row + step) / high))
            rows_first[some, rows] = unpack_rows(
                weight_format, codes[some, rows], scales[some, blocks], num_columns
            )
        return made

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor, ...], _Gather]:
        """Give FSDP2 what it gathers."""
        gather = _Gather(outer_size, self, mesh.size())
        if mesh.size() == 1:
            # FSDP2 passes on one tensor alone where it only copies from host memory.
            return (next(iter(self.parts.values()))[:0],), gather
        return tuple(self.parts.values()), gather

    def fsdp_post_all_gather(
        self,
        gathered: tuple[Tensor, ...],
        gather: _Gather,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Make what FSDP2 has gathered into experts to compute with.

        Returns:
            the experts, and what FSDP2 shall free beside what it has gathered; None with `out`,
            which has the same memory as the first time.
        """
        held = None if out is None else _find_packed(out)
        shard = gather.shard
        num_row_shards = 1 if self.cut is None else self.cut.num_shards
        if gather.num_ranks == 1:
            parts, copies = _copy_into(held, shard.parts), True
        elif num_row_shards == 1:
            parts, copies = dict(zip(shard.parts, gathered, strict=True)), False
        else:
            named = dict(zip(shard.parts, gathered, strict=True))
            shared = find_shared_parts(FORMATS[self.format_name])
            whole = {n: join_rows(p, num_row_shards, n in shared) for n, p in named.items()}
            parts, copies = _copy_into(held, whole), True
            for part in gathered:
                part.untyped_storage().resize_(0)  # FSDP2 allocates it for the next gather
        if held is not None:
            return None
        cut = None if self.cut is None else self.cut._replace(shard=0, num_shards=1)
        whole_experts = PackedExperts(
            parts,
            self.format_name,
            gather.size,
            param_dtype,
            is_transposed=self.is_transposed,
            cut=cut,
        )
        return whole_experts, tuple(parts.values()) if copies else ()

    def _rebuild(self, parts: Parts, dtype: torch.dtype) -> "PackedExperts":
        return PackedExperts(
            parts,
            self.format_name,
            self.shape,
            dtype,
            is_transposed=self.is_transposed,
            cut=self.cut,
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
        if isinstance(packed, PackedExperts):
            if func in _SAME or (func in _VIEWS and _is_same_view(packed, *args[1:])):
                return packed._rebuild(packed.parts, packed.dtype)
            if func in _COPIES and not (kwargs or {}).keys() - _OF_DEVICE:
                parts = {name: func(part, **(kwargs or {})) for name, part in packed.parts.items()}
                return packed._rebuild(parts, packed.dtype)
            if func is _aten.is_pinned.default:
                return all(part.is_pinned() for part in packed.parts.values())
        raise NotImplementedError(f"{func} of packed experts; dequantize them first")


# What of a copy says where it goes, and nothing of its dtype.
_OF_DEVICE = {"device", "non_blocking", "pin_memory"}


def _is_same_view(
    packed: PackedExperts,
    size: Sequence[int],
    stride: Sequence[int] | None = None,
    offset: int | None = None,
) -> bool:
    """Return whether a view is of all elements as they lie: in the same shape, or flat."""
    is_contiguous = stride is None or tuple(stride) == packed.stride()
    return is_contiguous and not offset and list(size) in (list(packed.shape), [-1])


def _find_packed(tensor: Tensor) -> PackedExperts:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    assert isinstance(local, PackedExperts), local
    return local


def _copy_into(held: PackedExperts | None, parts: Parts) -> dict[str, Tensor]:
    """Copy parts into memory of their own: that which is held, where there is some."""
    if held is None:
        return {name: part.clone() for name, part in parts.items()}
    for name, part in parts.items():
        held.parts[name].copy_(part)
    return held.parts


def list_stored(tensor: Tensor) -> list[Tensor]:
    """Return what of a tensor is in memory: the parts of a packed one, else itself."""
    return list(tensor.parts.values()) if isinstance(tensor, PackedExperts) else [tensor]
