"""Checks of a `--debug` run: where every parameter lies, and equal replicas."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megablocks_utils.fsdp.fsdp1 import strip_wrappers
from megablocks_utils.mesh.device_mesh import DP_AXIS
from megablocks_utils.mesh.placement import count_replicas, is_replicated, local_tensor
from megablocks_utils.moe.sharded_moe import ShardedMoE
from megablocks_utils.processes.agreement import max_over_ranks

_BITS = {4: torch.int32, 2: torch.int16}


def describe_placements(model: nn.Module) -> Iterator[str]:
    """Yield a line for each parameter: mesh axes, placements and the bytes this rank holds."""
    for name, parameter in model.named_parameters():
        local = local_tensor(parameter.detach())
        where = "plain tensor"
        if isinstance(parameter, DTensor):
            axes = parameter.device_mesh.mesh_dim_names or ("world",)
            where = ", ".join(
                f"{axis}: {placement!r}"
                for axis, placement in zip(axes, parameter.placements, strict=True)
            )
        num_bytes = local.numel() * local.element_size()
        yield f"{name} {tuple(parameter.shape)} on {where}, {num_bytes:,} bytes here"


def check_replicas(model: nn.Module, sharded: ShardedMoE | None, step: int) -> None:
    """Check bit by bit that replicas are equal: of experts on the dp axis, of others on all ranks.

    **Collective:** one all-reduce (of maxima) a parameter that has replicas, one at the end.

    Raises:
        RuntimeError: on every rank of the world, naming the step and the first parameter that
            differs on this rank.
    """
    differing = []
    for name, parameter, group in _replicas(model, sharded):
        own = local_tensor(parameter.detach())
        bits = own.view(_BITS[own.element_size()]).to(torch.int32)
        largest = bits.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        if not torch.equal(bits, largest):
            differing.append(name)
    if max_over_ranks(len(differing)):
        first = differing[0] if differing else "a parameter of other ranks"
        raise RuntimeError(f"after step {step} the copies of {first} differ between replicas")


def _replicas(
    model: nn.Module, sharded: ShardedMoE | None
) -> Iterator[tuple[str, Tensor, dist.ProcessGroup | None]]:
    """Yield each parameter that has replicas, with the group of the ranks that hold them."""
    for name, parameter in model.named_parameters():
        if is_replicated(parameter):
            yield strip_wrappers(name), parameter, None
    if sharded is None:
        return
    group, world_size = sharded.mesh.get_group(DP_AXIS), dist.get_world_size()
    for name, weight in sharded.expert_parameters.items():
        if count_replicas(weight, world_size) > 1:
            yield name, weight, group
