"""Compute with packed weights: dequantized just before, and again in backward.

What is saved for backward is the packed weight and which part of it was used. So it is with any
code that saves views of the weights it is given, whatever it computes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megablocks_utils.quantization.packed_experts import PackedExperts

__all__ = ["dequantize", "remade_in_backward"]


def dequantize(tensor: Tensor) -> Tensor:
    """Return the weights that a packed tensor stands for; any other tensor itself."""
    if not isinstance(tensor, PackedExperts):
        return tensor
    return tensor.dequantize_some(0, len(tensor))


@dataclass(frozen=True)
class _RemadeView:
    """A view of dequantized weights, which is made again when backward asks for it."""

    packed: PackedExperts
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def make(self) -> Tensor:
        per_expert = self.packed.shape[1] * self.packed.shape[2]
        reach = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        first = self.offset // per_expert
        # Backward of few experts at a time needs no more than these.
        made = self.packed.dequantize_some(first, (self.offset + reach) // per_expert + 1)
        return made.as_strided(self.size, self.stride, self.offset - first * per_expert)


@contextmanager
def remade_in_backward(made: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let autograd save, of weights that were dequantized, the packed ones alone.

    Args:
        made: pairs of packed and dequantized, alive as long as the context. Others are left alone.
    """
    by_storage = {
        dense.untyped_storage()._cdata: packed
        for packed, dense in made
        if isinstance(packed, PackedExperts)
    }
    pack_other, unpack_other = _current_hooks()

    def pack(tensor: Tensor) -> Any:
        # Not its address, which is 0 of all that is empty, or only rehearsed.
        packed = by_storage.get(tensor.untyped_storage()._cdata)
        if packed is None or tensor.numel() == 0:
            return pack_other(tensor)
        return _RemadeView(
            packed, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
        )

    def unpack(saved: Any) -> Tensor:
        return saved.make() if isinstance(saved, _RemadeView) else unpack_other(saved)

    with saved_tensors_hooks(pack, unpack):
        yield


def _current_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Return what autograd does now with what it saves: activation checkpointing has its own way.

    Of nested hooks torch calls the innermost alone.
    """
    current = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return current or (lambda tensor: tensor, lambda saved: saved)
