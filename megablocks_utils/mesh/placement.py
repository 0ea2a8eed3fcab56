"""Say where the weights of the experts lie: whole experts, split over the `ep` axis.

The only place that makes expert DTensors and takes their local part. What the `dp` axis does on top
(shard once more, or keep copies) is FSDP's business and is written in the DTensor's placements.
"""

from collections.abc import Sequence
from math import prod

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from megablocks_utils.mesh.device_mesh import EP_AXIS

_REPLICATED = "_is_replicated"


def mark_replicated(parameter: Tensor) -> None:
    """Say that every rank of the world holds a plain parameter whole: FSDP leaves it alone.

    A mark, since a class of its own would not survive fake tensors.
    """
    setattr(parameter, _REPLICATED, True)


def is_replicated(tensor: Tensor) -> bool:
    """Return whether every rank of the world holds this plain parameter whole."""
    return getattr(tensor, _REPLICATED, False)


def local_expert_range(num_experts: int, mesh: DeviceMesh) -> range:
    """Return the global ids of the experts this rank holds."""
    num_local = num_experts // mesh[EP_AXIS].size()
    first = mesh.get_local_rank(EP_AXIS) * num_local
    return range(first, first + num_local)


def distribute_experts(weights: Tensor, mesh: DeviceMesh) -> DTensor:
    """Split concatenated expert weights (E, ...) that every rank holds whole; no communication.

    The local part owns its memory, so that the whole tensor can be freed.
    """
    sharded = distribute_tensor(weights, mesh[EP_AXIS], [Shard(0)], src_data_rank=None)
    return wrap_local_experts(sharded.to_local().clone(), mesh)


def wrap_local_experts(local_weights: Tensor, mesh: DeviceMesh) -> DTensor:
    """Declare this rank's experts (L, ...) as its part of the weights of all experts (E, ...)."""
    return DTensor.from_local(local_weights, mesh[EP_AXIS], [Shard(0)], run_check=False)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank computes with (the tensor itself if it is plain).

    Gradients flow back with the placements of the DTensor.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_offsets(tensor: Tensor) -> tuple[int, ...]:
    """Return where this rank's part of a tensor begins in the whole tensor, along every dim.

    With the shape of `local_tensor(tensor)` this says which elements they are. The part may be
    empty; a plain tensor begins at zero. No communication.
    """
    offsets = [0] * tensor.dim()
    if not isinstance(tensor, DTensor):
        return tuple(offsets)
    mesh, sizes = tensor.device_mesh, list(tensor.shape)
    for axis in _axes_in_order_of_sharding(tensor.placements, mesh.shape):
        dim = _sharded_dim(tensor.placements[axis])
        chunk = -(-sizes[dim] // mesh.size(axis))  # as `torch.chunk` cuts: the last ones are short
        first = min(mesh.get_local_rank(axis) * chunk, sizes[dim])
        offsets[dim] += first
        sizes[dim] = min(chunk, sizes[dim] - first)
    assert tuple(sizes) == local_tensor(tensor.detach()).shape, (tensor.placements, sizes)
    return tuple(offsets)


def _axes_in_order_of_sharding(placements: Sequence[Placement], shape: Sequence[int]) -> list[int]:
    """Return the mesh axes that cut a tensor, the one that cut first in front.

    From left to right, but a strided shard cut what the axes right of it had left: FSDP2 shards
    over `dp` what is sharded over `ep` already.
    """
    plain: list[int] = []
    strided: list[int] = []
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        dim = _sharded_dim(placement)
        factor = getattr(placement, "split_factor", 1)
        (plain if factor == 1 else strided).append(axis)
        inside = [n for n in range(axis + 1, len(shape)) if placements[n] == Shard(dim)]
        assert factor == 1 or factor == prod(shape[n] for n in inside), f"{placements}"
    return plain + strided[::-1]


def _sharded_dim(placement: Placement) -> int:
    """Return the tensor dim that a placement shards, plain or strided."""
    dim = getattr(placement, "dim", None)
    assert isinstance(dim, int), f"{placement} is not supported"
    return dim


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
    for axis_size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        # Not `is_shard()`: it denies the strided shards of an expert that FSDP2 sharded over dp.
        shards *= 1 if placement.is_replicate() else axis_size
    return world_size // shards
