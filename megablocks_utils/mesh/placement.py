"""Say where the weights of experts lie: split over `ep`, and each expert over `expert_tp`.

The only place that makes expert DTensors and takes their local part. What the `dp` axis does on top
(shard once more, or keep copies) is FSDP's business and is written in the DTensor's placements.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from math import prod

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from megablocks_utils.mesh.device_mesh import EP_AXIS, EXPERT_TP_AXIS, axis_size
from megablocks_utils.mesh.shard_runs import count_parts, local_runs, sharded_dim

_REPLICATED = "_is_replicated"


@dataclass(frozen=True)
class DimSplit:
    """How the `expert_tp` axis cuts a tensor of experts.

    Attributes:
        dim: that is cut.
        num_parts: that lie one behind the other along it, all gates, then all ups; a rank has its
            share of each.
    """

    dim: int
    num_parts: int = 1


@dataclass(frozen=True)
class LocalBlock:
    """A block of a whole tensor, and where it lies in a rank's part of that.

    `offsets` is its first element in the whole, `starts` in the part, along every dim.
    """

    offsets: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def of(self, local: Tensor) -> Tensor:
        """Return its elements, a view of the rank's part."""
        for dim, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            local = local.narrow(dim, start, size)
        return local


def mark_replicated(parameter: Tensor) -> None:
    """Say that every rank of the world holds a plain parameter whole: FSDP leaves it alone.

    A mark, since a class of its own would not survive fake tensors.
    """
    setattr(parameter, _REPLICATED, True)


def is_replicated(tensor: Tensor) -> bool:
    """Return whether every rank of the world holds this plain parameter whole."""
    return getattr(tensor, _REPLICATED, False)


def local_expert_range(num_experts: int, mesh: DeviceMesh) -> range:
    """Return the places of this rank's experts in the split order, which is the model's or not."""
    num_local = num_experts // mesh[EP_AXIS].size()
    first = mesh.get_local_rank(EP_AXIS) * num_local
    return range(first, first + num_local)


def experts_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the axes that the experts are split over, before FSDP shards them."""
    if axis_size(mesh, EXPERT_TP_AXIS) == 1:
        return mesh[EP_AXIS]
    return mesh[EP_AXIS, EXPERT_TP_AXIS]


def declare_experts(split: DimSplit | None) -> dict[str, Placement]:
    """Declare how a tensor of experts (E, ...) lies on the axes that split experts.

    What is sharded and loaded reads this, and the placement plan that a run is checked by.

    Args:
        split: how `expert_tp` cuts it; None where each rank of that holds it whole.
    """
    inside: Placement = Replicate()
    if split is not None:
        inside = Shard(split.dim)
        if split.num_parts > 1:
            inside = _StridedShard(split.dim, split_factor=split.num_parts)
    return {EP_AXIS: Shard(0), EXPERT_TP_AXIS: inside}


def cut_slice(weights: Tensor, mesh: DeviceMesh, split: DimSplit | None) -> Tensor:
    """Return this rank's slice of some experts, (n, ...) whole; itself where they are not split."""
    size = axis_size(mesh, EXPERT_TP_AXIS)
    if split is None or size == 1:
        return weights
    parts = weights.unflatten(split.dim, (split.num_parts, size, -1))
    own = parts.select(split.dim + 1, mesh.get_local_rank(EXPERT_TP_AXIS))
    return own.flatten(split.dim, split.dim + 1)


def distribute_experts(weights: Tensor, mesh: DeviceMesh, split: DimSplit | None = None) -> DTensor:
    """Split concatenated expert weights (E, ...) that every rank holds whole; no communication.

    The local part owns its memory, so that the whole tensor can be freed.

    Args:
        weights: of all experts.
        mesh: of the experts.
        split: how `expert_tp` cuts them; None where each rank of it holds them whole.
    """
    mine = local_expert_range(len(weights), mesh)
    local = cut_slice(weights[mine.start : mine.stop], mesh, split)
    return wrap_local_experts(local.clone(memory_format=torch.contiguous_format), mesh, split)


def wrap_local_experts(
    local_weights: Tensor, mesh: DeviceMesh, split: DimSplit | None = None
) -> DTensor:
    """Declare this rank's part (L, ...) as such of the weights of all experts (E, ...).

    Args:
        local_weights: this rank's experts, and of these its slice.
        mesh: of the experts.
        split: how `expert_tp` cuts them; None where each rank of it holds them whole.
    """
    own_mesh = experts_mesh(mesh)
    declared, axes = declare_experts(split), own_mesh.mesh_dim_names or (EP_AXIS,)
    placements = [declared[axis] for axis in axes]
    shape = list(local_weights.shape)
    for axis, placement in zip(axes, placements, strict=True):
        if not placement.is_replicate():
            shape[sharded_dim(placement)] *= axis_size(mesh, axis)
    return DTensor.from_local(
        local_weights,
        own_mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),  # torch would not count a strided shard
        stride=tuple(prod(shape[dim + 1 :]) for dim in range(len(shape))),
    )


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank computes with (the tensor itself if it is plain).

    Gradients flow back with the placements of the DTensor.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_blocks(tensor: Tensor, experts: Sequence[int] | None = None) -> tuple[LocalBlock, ...]:
    """Return which elements of the whole tensor this rank's part holds; none of an empty part.

    One block, or one for each part of a dim that is split part by part, and for each run of
    consecutive experts where `experts` says which lies where along dim 0 (None: as in the model). A
    plain tensor is one block. No communication.
    """
    runs = local_runs(tensor, experts)
    sizes = tuple(sum(map(len, of_dim)) for of_dim in runs)
    assert sizes == local_tensor(tensor.detach()).shape, (tensor, sizes)
    starts = [list(accumulate(map(len, of_dim), initial=0)) for of_dim in runs]
    return tuple(
        LocalBlock(
            offsets=tuple(run.start for run, _ in chosen),
            starts=tuple(start for _, start in chosen),
            sizes=tuple(len(run) for run, _ in chosen),
        )
        for chosen in product(*map(zip, runs, starts))
    )


def is_cut_into_slices(parameter: Tensor) -> bool:
    """Return whether `expert_tp` cuts an expert's parameter, and does not copy it."""
    assert isinstance(parameter, DTensor), parameter.shape
    return find_sharded_dim(parameter, EXPERT_TP_AXIS) is not None


def find_sharded_dim(tensor: Tensor, axis: str) -> int | None:
    """Return which dim of a tensor an axis shards; None where it keeps copies or is not there."""
    if not isinstance(tensor, DTensor):
        return None
    names = tensor.device_mesh.mesh_dim_names or ()
    placement = tensor.placements[names.index(axis)] if axis in names else None
    if placement is None or placement.is_replicate():
        return None
    return sharded_dim(placement)


def find_dims_in_parts(tensor: Tensor) -> set[int]:
    """Return the dims of which a rank has a share of several parts, as `DimSplit` says."""
    if not isinstance(tensor, DTensor):
        return set()
    placements = tensor.placements
    return {
        sharded_dim(placement)
        for axis, placement in enumerate(placements)
        if not placement.is_replicate() and count_parts(placements, axis) > 1
    }


def count_replicas(tensor: Tensor, world_size: int) -> int:
    """Count the ranks of the world that hold the same part of a tensor.

    A plain tensor is taken as this rank's own part (the shards of FSDP1 are plain tensors), unless
    it is marked as replicated.
    """
    if is_replicated(tensor):
        return world_size
    if not isinstance(tensor, DTensor):
        return 1
    shards = 1
    for num_ranks, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        # Not `is_shard()`: it denies the strided shards of an expert that FSDP2 sharded over dp.
        shards *= 1 if placement.is_replicate() else num_ranks
    return world_size // shards
