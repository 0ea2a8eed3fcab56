"""Checks of a `--debug` run: where every parameter lies, and equal replicas.

And one of the first step of every run with tensor parallelism: equal gradients of replicas.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.fsdp.expert_units import shards_over_dp
from megablocks_utils.fsdp.fsdp1 import strip_wrappers
from megablocks_utils.mesh.dense_mesh import DENSE_DP_AXIS, TP_AXIS
from megablocks_utils.mesh.device_mesh import copy_axes
from megablocks_utils.mesh.placement import is_replicated, local_tensor
from megablocks_utils.moe.sharded_moe import ShardedMoE
from megablocks_utils.processes.agreement import max_over_ranks, raise_on_all_ranks
from megablocks_utils.quantization.packed_experts import list_stored

_MAX_DIFFERENCE = 0.05
"""Of norms, relative to the larger: rounding is far below, a sum that is missing above."""
_BITS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


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
        num_bytes = sum(stored.nbytes for stored in list_stored(local))
        yield f"{name} {tuple(parameter.shape)} on {where}, {num_bytes:,} bytes here"


def check_replicas(model: nn.Module, sharded: ShardedMoE | None, step: int) -> None:
    """Check bit by bit that replicas are equal: of experts, of whole groups, of whole parameters.

    **Collective:** one all-reduce (of maxima) for each axis along which a parameter has replicas,
    one at the end.

    Raises:
        RuntimeError: on every rank of the world, naming the step and the first parameter that
            differs on this rank.
    """
    differing = []
    for name, parameter, group in _replicas(model, sharded):
        for own in list_stored(local_tensor(parameter.detach())):
            bits = own.view(_BITS[own.element_size()]).to(torch.int32)
            largest = bits.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            if not torch.equal(bits, largest):
                differing.append(name)
    if max_over_ranks(len(differing)):
        first = differing[0] if differing else "a parameter of other ranks"
        raise RuntimeError(f"after step {step} the copies of {first} differ between replicas")


def check_gradients_beside_tp(model: nn.Module, sharded: ShardedMoE) -> None:
    """Check that the ranks of a tp group have the same gradients of what each holds whole.

    They differ where a parameter sees one rank's heads or features and its plan does not say so.

    **Collective:** two all-reduces of a number a parameter over the tp group, one all-gather; every
    rank must call, after the gradients of a step and before they are dropped.

    Raises:
        ConfigurationError: on every rank, naming the first parameter whose norms differ.
    """
    group = _find_tp_group(sharded)
    beside = {
        name: local_tensor(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and _is_beside_tp(parameter)
    }
    if group is None or not beside:
        return
    largest = torch.stack([grad.norm(dtype=torch.float32) for grad in beside.values()])
    smallest = largest.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
    # What is zero but for rounding is compared with the largest.
    is_off = largest - smallest > _MAX_DIFFERENCE * largest + 1e-6 * largest.max()
    differing = [name for name, off in zip(beside, is_off.tolist(), strict=True) if off]
    raise_on_all_ranks(lambda: _refuse_tp(differing, dist.get_world_size(group)))


def _refuse_tp(differing: Sequence[str], tp_size: int) -> None:
    if differing:
        raise ConfigurationError(
            f"tp_size is {tp_size}, but it must be 1 for this model: its ranks have different "
            f"gradients of {strip_wrappers(differing[0])} ({len(differing)} parameters in all), "
            "which each holds whole; transformers' tensor-parallel plan does not say that they "
            "must be summed.",
            parameters=("tp_size",),
        )


def _replicas(
    model: nn.Module, sharded: ShardedMoE | None
) -> Iterator[tuple[str, Tensor, dist.ProcessGroup | None]]:
    """Yield each parameter that has replicas, with a group of ranks that hold them.

    Where they lie along two axes it is yielded with each.
    """
    tp_group = None if sharded is None else _find_tp_group(sharded)
    for name, parameter in model.named_parameters():
        if is_replicated(parameter):
            yield strip_wrappers(name), parameter, None
        elif tp_group is not None and _is_beside_tp(parameter):
            yield strip_wrappers(name), parameter, tp_group
        for group in _groups_of_copies(parameter):
            yield strip_wrappers(name), parameter, group
    if sharded is None or shards_over_dp(sharded):
        return
    for name, weight in sharded.expert_parameters.items():
        for axis in copy_axes(sharded.mesh):
            yield name, weight, sharded.mesh.get_group(axis)


def _groups_of_copies(parameter: Tensor) -> Iterator[dist.ProcessGroup]:
    """Yield the groups in which FSDP keeps copies of a shard."""
    if not isinstance(parameter, DTensor):
        return
    mesh = parameter.device_mesh
    for axis, placement in enumerate(parameter.placements):
        if placement.is_replicate() and mesh.size(axis) > 1:
            yield mesh.get_group(axis)


def _find_tp_group(sharded: ShardedMoE) -> dist.ProcessGroup | None:
    splits = [module.token_split for module in sharded.expert_modules.values()]
    return None if not splits or splits[0] is None else splits[0].group


def _is_beside_tp(parameter: Tensor) -> bool:
    """Return whether FSDP shards a parameter that the ranks of a tp group hold alike."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return DENSE_DP_AXIS in names and TP_AXIS not in names
