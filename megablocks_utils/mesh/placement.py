"""Say where the weights of the experts lie: whole experts, split over the `ep` axis.

The only place that makes expert DTensors and takes their local part. What the `dp` axis does on top
(shard once more, or keep copies) is FSDP's business and is written in the DTensor's placements.
"""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megablocks_utils.mesh.device_mesh import EP_AXIS


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


def count_replicas(tensor: Tensor, world_size: int) -> int:
    """Count the ranks of the world that hold the same part of a tensor.

    A plain tensor is taken as this rank's own part (the shards of FSDP1 are plain tensors).
    """
    if not isinstance(tensor, DTensor):
        return 1
    shards = 1
    for axis_size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        # Not `is_shard()`: it denies the strided shards of an expert that FSDP2 sharded over dp.
        shards *= 1 if placement.is_replicate() else axis_size
    return world_size // shards
