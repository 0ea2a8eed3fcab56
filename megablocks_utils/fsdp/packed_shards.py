"""Packed experts under FSDP2: how they are sharded, and how each rank packs its shard.

FSDP2 gathers the parts of a tensor that is more than its elements only where it shards whole
experts, as many on each rank. Shards of rows, and experts that do not divide, it takes for such.
"""

import math
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, Shard

from megablocks_utils.mesh.device_mesh import DP_AXIS, EXPERT_TP_AXIS, axis_size
from megablocks_utils.mesh.placement import find_sharded_dim, local_tensor
from megablocks_utils.mesh.shard_runs import local_runs
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.quantization.format_table import FORMATS
from megablocks_utils.quantization.packed_experts import PackedExperts
from megablocks_utils.quantization.weight_format import MatrixCut

__all__ = ["choose_packed_dim", "is_packed", "pack_experts", "let_fsdp2_gather_packed"]


def is_packed(module: nn.Module, attribute: str) -> TypeGuard[DroplessExperts]:
    """Return whether a parameter is of experts that are packed when they are filled."""
    return (
        isinstance(module, DroplessExperts)
        and module.weight_format is not None
        and attribute in module.spec.projections
    )


def choose_packed_dim(experts: DroplessExperts, parameter: nn.Parameter, dp_size: int) -> Shard:
    """Choose what FSDP2 shards: whole experts, else rows in whole blocks, else unequal experts."""
    assert experts.weight_format is not None, experts
    rows_dim = _rows_dim(experts)
    num_experts, num_rows = (local_tensor(parameter).shape[dim] for dim in (0, rows_dim))
    row_block, _ = FORMATS[experts.weight_format].block
    by_rows = (
        num_experts % dp_size != 0
        and num_rows % (dp_size * row_block) == 0
        and find_sharded_dim(parameter, EXPERT_TP_AXIS) != rows_dim
    )
    return Shard(rows_dim if by_rows else 0)


def let_fsdp2_gather_packed(experts: nn.Module) -> None:
    """Tell FSDP2 that shards of packed weights are whole experts, as many on each rank.

    What a rank gives for a gather is of one size, and what is made of it has the rows in their
    places; FSDP2 refuses to believe either of other shards.

    Args:
        experts: already a unit of FSDP2.
    """
    assert isinstance(experts, FSDPModule), experts
    state = experts._get_fsdp_state()
    for group in state._fsdp_param_groups:
        for held in group.fsdp_params:
            where = held._module_info
            if is_packed(where.module, where.param_name):
                held.fsdp_placement = Shard(0)
                held.padded_sharded_param_size = held.sharded_size


def pack_experts(
    parameter: nn.Parameter,
    experts: DroplessExperts,
    name: str,
    fill_local: Callable[[str, Tensor, tuple[int, ...]], None],
    *,
    device: torch.device,
    offload: CPUOffloadPolicy | None,
) -> PackedExperts:
    """Read one whole expert after the other, in fp32, pack it, and keep this rank's part.

    Packed whole, the weights are the same ones on every layout. What is stored in the format keeps
    its bits.

    Args:
        parameter: on meta, sharded as it will be.
        experts: whose it is.
        name: of the parameter in the transformers model.
        fill_local: where the values come from.
        device: where this rank computes.
        offload: FSDP2's, which has shards in host memory; None: they are on the device.
    """
    assert experts.weight_format is not None, experts
    lie = None if experts.slots is None else experts.slots.experts
    packed = PackedExperts.empty(
        experts.weight_format,
        local_tensor(parameter.detach()),
        device=device if offload is None else torch.device("cpu"),
        is_transposed=experts.spec.is_transposed,
        cut=_find_cut(parameter, _rows_dim(experts)),
        num_allocated=_count_allocated(parameter),
        pin_memory=offload is not None and offload.pin_memory,
    )
    matrix = torch.empty((1, *parameter.shape[1:]), dtype=torch.float32)
    mine = (expert for run in local_runs(parameter, lie)[0] for expert in run)
    for number, expert in enumerate(mine):
        stored = None if experts.read_stored is None else experts.read_stored(name, expert)
        if stored is not None:
            packed.put_expert(number, stored)
            continue
        fill_local(name, matrix, (expert, 0, 0))
        packed.pack_expert(number, matrix[0].to(device))
    return packed


def _rows_dim(experts: DroplessExperts) -> int:
    """Return the dim of a projection (E, out, in), or (E, in, out), that has the outputs."""
    return 2 if experts.spec.is_transposed else 1


def _find_cut(parameter: nn.Parameter, rows_dim: int) -> MatrixCut:
    """Return what this rank keeps of each matrix: what it computes with, or a shard of that."""
    columns_dim = 3 - rows_dim
    runs = local_runs(parameter, without=DP_AXIS)
    (columns,) = runs[columns_dim]
    sizes = parameter.shape[rows_dim], parameter.shape[columns_dim]
    if find_sharded_dim(parameter, DP_AXIS) != rows_dim:
        return MatrixCut(runs[rows_dim], columns, *sizes)
    assert isinstance(parameter, DTensor), "it is sharded"
    mesh = parameter.device_mesh
    shard = mesh.get_local_rank(DP_AXIS)
    return MatrixCut(runs[rows_dim], columns, *sizes, shard, axis_size(mesh, DP_AXIS))


def _count_allocated(parameter: nn.Parameter) -> int:
    """Return how many experts every rank has room for, of which it may hold fewer."""
    num_experts = sum(map(len, local_runs(parameter, without=DP_AXIS)[0]))
    if find_sharded_dim(parameter, DP_AXIS) != 0:
        return num_experts
    assert isinstance(parameter, DTensor), "it is sharded"
    return math.ceil(num_experts / axis_size(parameter.device_mesh, DP_AXIS))
