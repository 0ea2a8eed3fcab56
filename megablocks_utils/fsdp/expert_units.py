"""The experts as FSDP2 units of their own: sharded over dp, or copied in from host memory."""

from functools import partial

from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard

from megablocks_utils.fsdp.packed_shards import (
    choose_packed_dim,
    is_packed,
    let_fsdp2_gather_packed,
)
from megablocks_utils.mesh.device_mesh import DP_AXIS, axis_size, copy_axes
from megablocks_utils.mesh.placement import find_dims_in_parts, is_replicated, local_tensor
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.moe.sharded_moe import ShardedMoE

__all__ = ["holds_experts", "shard_experts_over_dp", "shards_over_dp"]


def shards_over_dp(sharded: ShardedMoE) -> bool:
    """Return whether FSDP shards the experts: asked for, and more than one rank to shard over."""
    return sharded.expert_dp == "shard" and axis_size(sharded.mesh, DP_AXIS) > 1


def holds_experts(sharded: ShardedMoE, offload: OffloadPolicy) -> bool:
    """Return whether FSDP has the experts: to shard them, or to copy them from host memory.

    Copies of them it would shard, so `params` is refused where experts are replicated over dp.
    """
    is_only_copy = not copy_axes(sharded.mesh)
    return shards_over_dp(sharded) or (is_only_copy and isinstance(offload, CPUOffloadPolicy))


def shard_experts_over_dp(
    sharded: ShardedMoE, policy: MixedPrecisionPolicy, offload: OffloadPolicy
) -> None:
    """Shard each experts module over the dp axis, so that a rank holds 1/world of the weights.

    Whole experts where they divide evenly, else rows of every expert, else (adapters of small rank)
    columns: without padding wherever one of them divides. Not what lies in parts, gate and up, that
    `expert_tp` has cut: torch knows no shard of these.
    """
    axes, dp_size = copy_axes(sharded.mesh), axis_size(sharded.mesh, DP_AXIS)
    # Of two axes FSDP shards over the last and keeps copies over the first.
    dp_mesh = sharded.mesh[tuple(axes) or (DP_AXIS,)]

    def choose_dim(module: DroplessExperts, parameter: nn.Parameter) -> Shard:
        if parameter in packed:
            return choose_packed_dim(module, parameter, dp_size)
        sizes = local_tensor(parameter).shape
        cut_in_parts = find_dims_in_parts(parameter)
        even = (n for n, size in enumerate(sizes) if size % dp_size == 0 and n not in cut_in_parts)
        return Shard(next(even, 0))

    modules = sharded.expert_modules.values()
    packed = {m.get_parameter(n) for m in modules for n in m.spec.projections if is_packed(m, n)}
    for module in modules:
        fully_shard(
            module,
            mesh=dp_mesh,
            mp_policy=policy,
            offload_policy=offload,
            shard_placement_fn=partial(choose_dim, module),
            ignored_params={p for p in module.parameters() if is_replicated(p)},
        )
        let_fsdp2_gather_packed(module)
