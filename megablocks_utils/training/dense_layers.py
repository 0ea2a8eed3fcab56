"""Place what is not experts on its own mesh, its layers split over the tp axis."""

import torch
from rich.console import Console
from transformers import PreTrainedModel

from megablocks_utils.config import RunConfig
from megablocks_utils.fsdp.placement_plan import PlacementPlan, build_placement_plan
from megablocks_utils.fsdp.tensor_parallel import split_dense_layers
from megablocks_utils.mesh.dense_mesh import build_dense_mesh
from megablocks_utils.moe.sharded_moe import ShardedMoE
from megablocks_utils.processes.agreement import raise_on_all_ranks

__all__ = ["place_parameters"]


def place_parameters(
    model: PreTrainedModel,
    sharded: ShardedMoE | None,
    config: RunConfig,
    device: torch.device,
    console: Console,
) -> PlacementPlan:
    """Declare how every parameter will lie; split dense layers where the options say so.

    What transformers' plan would split and this does not, it says in a line each.

    **Collective:** every rank of the world must call, where there is a mesh: groups are made.

    Args:
        model: on meta, adapters attached; changed in place.
        sharded: how its experts are split.
        config: the run.
        device: where this rank computes.
        console: of rank 0.

    Raises:
        ConfigurationError: on every rank, of a model that cannot be split so.
    """
    parallel = config.parallel
    mesh = build_dense_mesh(
        device.type, tp_size=parallel.tp_size, dp_replicate_size=parallel.dp_replicate_size
    )
    if parallel.tp_size > 1:
        assert mesh is not None and sharded is not None, "the options were checked together"
        plan = raise_on_all_ranks(lambda: split_dense_layers(model, sharded, mesh))
        for pattern, reason in plan.left_whole.items():
            note = f"whole on every rank of a tp group: {pattern} ({reason})"
            console.print(note, markup=False, soft_wrap=True)
    return build_placement_plan(model, sharded, mesh)
