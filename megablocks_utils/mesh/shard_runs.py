"""Which places along each dim of a tensor the mesh axes leave to this rank, axis by axis."""

from collections.abc import Iterator, Sequence
from math import prod

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard

__all__ = ["count_parts", "local_runs", "sharded_dim"]


def local_runs(
    tensor: Tensor, experts: Sequence[int] | None = None, *, without: str | None = None
) -> list[list[range]]:
    """Return which places of each dim this rank's part holds, in the order in which they lie.

    Args:
        tensor: whole, as a DTensor.
        experts: which expert lies where along dim 0; None: as in the model.
        without: an axis that is left out, as if it had kept copies.
    """
    runs = [[range(size)] for size in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for axis in _axes_in_order_of_sharding(tensor.placements, mesh.shape):
            if mesh.mesh_dim_names is not None and mesh.mesh_dim_names[axis] == without:
                continue
            dim = sharded_dim(tensor.placements[axis])
            num_parts = count_parts(tensor.placements, axis)
            place = mesh.get_local_rank(axis), mesh.size(axis)
            runs[dim] = [run for part in _cut(runs[dim], num_parts) for run in _take(part, *place)]
    if experts is not None:
        assert len(experts) == len(tensor), (len(experts), tensor.shape)
        runs[0] = _join([experts[place] for run in runs[0] for place in run])
    return runs


def sharded_dim(placement: Placement) -> int:
    """Return the tensor dim that a placement shards, plain or strided."""
    dim = getattr(placement, "dim", None)
    assert isinstance(dim, int), f"{placement} is not supported"
    return dim


def count_parts(placements: Sequence[Placement], axis: int) -> int:
    """Return how many parts of a dim an axis cuts by themselves: gate and up, see `DimSplit`.

    torch has the same placement for it as for what FSDP2 shards behind other axes.
    """
    if _axes_inside(placements, axis):
        return 1
    return getattr(placements[axis], "split_factor", 1)


def _cut(runs: Sequence[range], num_parts: int) -> Iterator[list[range]]:
    """Cut consecutive runs into parts of equal size."""
    size = sum(map(len, runs)) // num_parts
    assert num_parts == 1 or size * num_parts == sum(map(len, runs)), (runs, num_parts)
    for number in range(num_parts):
        yield _window(runs, number * size, (number + 1) * size)


def _take(runs: Sequence[range], rank: int, num_ranks: int) -> list[range]:
    """Return a rank's chunk of runs, as `torch.chunk` cuts: the last ones are short."""
    chunk = -(-sum(map(len, runs)) // num_ranks)
    return _window(runs, rank * chunk, (rank + 1) * chunk)


def _join(numbers: Sequence[int]) -> list[range]:
    """Return numbers as runs of consecutive ones."""
    found: list[range] = []
    for number in numbers:
        follows = bool(found) and found[-1].stop == number
        start = found.pop().start if follows else number
        found.append(range(start, number + 1))
    return found


def _window(runs: Sequence[range], start: int, stop: int) -> list[range]:
    """Return what lies from `start` to `stop` where runs stand one after the other."""
    found, first = [], 0
    for run in runs:
        found.append(run[max(0, start - first) : max(0, stop - first)])
        first += len(run)
    return [run for run in found if run]


def _axes_in_order_of_sharding(placements: Sequence[Placement], shape: Sequence[int]) -> list[int]:
    """Return the mesh axes that cut a tensor, the one that cut first in front.

    From left to right, but FSDP2's strided shard cut what the axes right of it had left: FSDP2
    shards over `dp` what is sharded over `ep` already.
    """
    plain: list[int] = []
    strided: list[int] = []
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        factor, inside = getattr(placement, "split_factor", 1), _axes_inside(placements, axis)
        (strided if factor > 1 and inside else plain).append(axis)
        assert not inside or factor in (1, prod(shape[n] for n in inside)), f"{placements}"
    return plain + strided[::-1]


def _axes_inside(placements: Sequence[Placement], axis: int) -> list[int]:
    """Return the mesh axes right of one that shard the same dim."""
    dim = sharded_dim(placements[axis])
    return [n for n in range(axis + 1, len(placements)) if placements[n] == Shard(dim)]
