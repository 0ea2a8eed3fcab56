"""Wrap a rank of many as a run does, and compare what it holds with the placement plan."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.scale_ranks import CPU, Case, build
from megablocks_utils.config import resolve_precision
from megablocks_utils.fsdp.fsdp2 import build_accelerator, wrap_fsdp2
from megablocks_utils.fsdp.placement_check import check_own_parts, check_sums
from megablocks_utils.fsdp.placement_plan import PlacementPlan, build_placement_plan
from megablocks_utils.mesh.dense_mesh import build_dense_mesh
from megablocks_utils.rehearsal.fake_process_group import fake_process_group
from megablocks_utils.rehearsal.fewer_layers import keep_layers
from megablocks_utils.rehearsal.rehearsed_runs import layer_classes
from megablocks_utils.training.model_source import split_experts

__all__ = ["Held", "check_all", "hold"]


@dataclass(frozen=True)
class Held:
    """What one rank holds of a model's first and last layer, as the plan says.

    Attributes:
        plan: of the run, without its meshes.
        counts: elements of each of the plan's entries.
    """

    plan: PlacementPlan
    counts: Sequence[int]


def hold(case: Case, rank: int) -> Held:
    """Wrap one rank, and check that all it holds lies as declared.

    Raises:
        PlacementError: naming the first parameter or entry that does not.
    """
    config, whole = case.config(), build(case.model)
    model = keep_layers(whole, [0, whole.config.num_hidden_layers - 1])
    with fake_process_group(case.world_size, CPU.type, rank):
        sharded = split_experts(model, config, CPU, torch.bfloat16, case.tokens)
        mesh = build_dense_mesh(CPU.type, dp_replicate_size=case.num_groups)
        plan = build_placement_plan(model, sharded, mesh)
        precision = resolve_precision(config, CPU.type)
        classes = layer_classes(model)
        accelerator = build_accelerator(config, precision, classes, CPU.type, mesh)
        wrapped = wrap_fsdp2(accelerator, model, sharded)
        return Held(replace(plan, dense_mesh=None), check_own_parts(wrapped, plan))


def check_all(held: Sequence[Held]) -> None:
    """Check that all ranks together hold each element as often as it has copies.

    Raises:
        PlacementError: naming the first entry of which they do not.
    """
    check_sums(held[0].plan, [one.counts for one in held])
