"""Make the mesh of what is not experts, and split the dense layers over its tp axis."""

import torch
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from megablocks_utils.config import RunConfig
from megablocks_utils.fsdp.tensor_parallel import split_dense_layers
from megablocks_utils.mesh.dense_mesh import build_dense_mesh
from megablocks_utils.moe.sharded_moe import ShardedMoE
from megablocks_utils.processes.agreement import raise_on_all_ranks

__all__ = ["prepare_dense_layers"]


def prepare_dense_layers(
    model: PreTrainedModel,
    sharded: ShardedMoE | None,
    config: RunConfig,
    device: torch.device,
    console: Console,
) -> DeviceMesh | None:
    """Make the mesh of the dense parameters, and split these where the options say so.

    What transformers' plan would split and this does not, it says in a line each.

    **Collective:** every rank of the world must call, where there is a mesh: groups are made.

    Args:
        model: on meta, adapters attached; changed in place.
        sharded: how its experts are split.
        config: the run.
        device: where this rank computes.
        console: of rank 0.

    Returns:
        The mesh; None where FSDP shards over the world.

    Raises:
        ConfigurationError: on every rank, of a model that cannot be split so.
    """
    parallel = config.parallel
    mesh = build_dense_mesh(
        device.type, tp_size=parallel.tp_size, dp_replicate_size=parallel.dp_replicate_size
    )
    if mesh is None or parallel.tp_size == 1:
        return mesh
    assert sharded is not None, "the options were checked together"
    plan = raise_on_all_ranks(lambda: split_dense_layers(model, sharded, mesh))
    for pattern, reason in plan.left_whole.items():
        note = f"whole on every rank of a tp group: {pattern} ({reason})"
        console.print(note, markup=False, soft_wrap=True)
    return mesh
