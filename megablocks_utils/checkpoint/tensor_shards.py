"""Say which part of a whole tensor a rank holds.

However a parameter is sharded, a rank's part of it is a block (FSDP2, experts) or a range of its
flattened elements (FSDP1). Both become blocks of the parameter's own shape, so that a checkpoint
holds the model's real tensors and can be read with any other mesh and sharding.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from megablocks_utils.mesh.placement import LocalBlock

__all__ = ["Block", "BlockPlace", "PartPlace", "Place", "RunPlace", "TensorShard"]


@dataclass(frozen=True)
class Block:
    """Hold a rectangular part of a whole tensor.

    Attributes:
        offsets: of its first element in the whole tensor, along every dim.
        tensor: its elements, a view of what is saved or filled.
    """

    offsets: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True)
class TensorShard:
    """Hold what one rank has of a whole tensor.

    Attributes:
        whole_shape: of the tensor.
        blocks: that do not overlap; none where the rank holds nothing of it.
    """

    whole_shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    def tensor_at(self, offsets: Sequence[int]) -> Tensor:
        """Return the block that begins at `offsets`."""
        return next(block.tensor for block in self.blocks if block.offsets == tuple(offsets))

    def copied_to_cpu(self) -> "TensorShard":
        """Return a copy in host memory, which later steps do not change."""
        blocks = (
            Block(block.offsets, block.tensor.to("cpu", copy=True).contiguous())
            for block in self.blocks
        )
        return TensorShard(self.whole_shape, tuple(blocks))


@dataclass(frozen=True)
class BlockPlace:
    """Say that a rank holds one block of a tensor, from `offsets` on."""

    whole_shape: tuple[int, ...]
    offsets: tuple[int, ...]

    def shard(self, local: Tensor) -> TensorShard:
        """Return the shard whose elements are `local`, of any size."""
        blocks = (Block(self.offsets, local),) if local.numel() else ()
        return TensorShard(self.whole_shape, blocks)


@dataclass(frozen=True)
class PartPlace:
    """Say that a rank's part of a tensor is made of blocks: one, or as many as a dim has parts."""

    whole_shape: tuple[int, ...]
    blocks: tuple[LocalBlock, ...]

    def shard(self, local: Tensor) -> TensorShard:
        """Return the shard whose elements are `local`."""
        blocks = (Block(block.offsets, block.of(local)) for block in self.blocks)
        return TensorShard(self.whole_shape, tuple(blocks) if local.numel() else ())


@dataclass(frozen=True)
class RunPlace:
    """Say that a rank holds consecutive elements of a tensor, from flat index `start` on."""

    whole_shape: tuple[int, ...]
    start: int

    def shard(self, local: Tensor) -> TensorShard:
        """Return the shard whose elements are those of the contiguous `local`."""
        flat = local.view(-1)
        blocks, first = [], 0
        for offsets, sizes in _split_run(self.start, self.start + len(flat), self.whole_shape):
            last = first + math.prod(sizes)
            blocks.append(Block(offsets, flat[first:last].view(sizes)))
            first = last
        return TensorShard(self.whole_shape, tuple(blocks))


Place = BlockPlace | PartPlace | RunPlace


def _split_run(
    start: int, stop: int, shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offsets and sizes of blocks that hold elements `start:stop` of a shape, in order.

    The rest of a row, whole rows, and the beginning of a row; the two ends likewise inside.
    """
    if len(shape) == 1:
        if start < stop:
            yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first_whole, last_whole = -(-start // row), stop // row
    if start < stop < first_whole * row or first_whole > last_whole:
        yield from _inside_row(start, stop, shape)
        return
    yield from _inside_row(start, first_whole * row, shape)
    if first_whole < last_whole:
        inner = tuple(shape[1:])
        yield (first_whole, *(0 for _ in inner)), (last_whole - first_whole, *inner)
    yield from _inside_row(last_whole * row, stop, shape)


def _inside_row(
    start: int, stop: int, shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    if start == stop:
        return
    row = math.prod(shape[1:])
    number = start // row
    for offsets, sizes in _split_run(start - number * row, stop - number * row, shape[1:]):
        yield (number, *offsets), (1, *sizes)
