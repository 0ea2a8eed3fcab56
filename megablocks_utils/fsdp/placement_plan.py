"""The declared plan of a run: how each parameter lies along every mesh axis, why, and its gradient.

It is made of the model as it is before FSDP wraps it. What FSDP then did is compared with it by
`placement_check`: two statements that do not know each other.

An entry's pattern is a name with `*` for every number; where the layers differ in kind, the name.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from megablocks_utils.fsdp.placement_rules import (
    BUFFERS,
    COPIES,
    ExpertRules,
    PlacementRule,
    find_dense_rule,
)
from megablocks_utils.fsdp.places import find_buffers
from megablocks_utils.mesh.dense_mesh import TP_AXIS
from megablocks_utils.mesh.device_mesh import (
    DP_AXIS,
    DP_REPLICATE_AXIS,
    EP_AXIS,
    EXPERT_TP_AXIS,
    axis_size,
)
from megablocks_utils.moe.sharded_moe import ShardedMoE

__all__ = ["PlacementEntry", "PlacementPlan", "build_placement_plan", "describe_plan"]
__all__ += ["find_pattern"]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class PlacementEntry:
    """The parameters of a model that a pattern names.

    Attributes:
        pattern: what their names match.
        rule: how they lie.
        is_trained: whether they have gradients.
        num_parameters: how many there are.
        num_elements: of all of them, whole.
    """

    pattern: str
    rule: PlacementRule
    is_trained: bool
    num_parameters: int
    num_elements: int


@dataclass(frozen=True)
class PlacementPlan:
    """How everything lies that a run holds.

    Attributes:
        axis_sizes: ranks along "dp_replicate", "dp", "ep" and "expert_tp", in this order, without
            the first or last where that is 1: those of the experts' mesh, also where there is none.
        entries: each parameter and persistent buffer is in exactly one.
        dense_mesh: of what is not experts; None where FSDP shards it over the world.
    """

    axis_sizes: dict[str, int]
    entries: tuple[PlacementEntry, ...]
    dense_mesh: DeviceMesh | None = None

    @property
    def dense_axis_sizes(self) -> dict[str, int]:
        """Ranks along the axes of the dense mesh, where it has a tp axis; else none."""
        mesh = self.dense_mesh
        if mesh is None or axis_size(mesh, TP_AXIS) == 1:
            return {}
        assert mesh.mesh_dim_names is not None, mesh
        return dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))

    def axis_sizes_of(self, entry: PlacementEntry) -> dict[str, int]:
        """Return the axes that an entry's rule speaks of: the experts', or the dense mesh's."""
        has_tp = TP_AXIS in entry.rule.placements
        return self.dense_axis_sizes if has_tp else self.axis_sizes

    def count_copies(self, entry: PlacementEntry) -> int:
        """Return how many ranks hold the same part of a parameter."""
        placements, sizes = entry.rule.placements, self.axis_sizes_of(entry)
        return prod(n for axis, n in sizes.items() if placements[axis] == COPIES)


def build_placement_plan(
    model: nn.Module, sharded: ShardedMoE | None, dense_mesh: DeviceMesh | None = None
) -> PlacementPlan:
    """Declare how every parameter and persistent buffer will lie. No communication.

    Args:
        model: not wrapped yet; its experts split, adapters attached.
        sharded: how its experts are split; None where FSDP shards them like all else.
        dense_mesh: of what is not experts; None where FSDP shards it over the world.
    """
    expert_rules = ExpertRules(sharded)
    has_tp = dense_mesh is not None and axis_size(dense_mesh, TP_AXIS) > 1
    of_all = set() if sharded is None else _parameter_names(sharded.post_expert_norms)
    held: dict[str, list[tuple[str, Tensor, PlacementRule]]] = {}
    for name, parameter in model.named_parameters():
        splits = has_tp and name not in of_all
        rule = expert_rules.find(name) or find_dense_rule(name, parameter, has_tp=splits)
        held.setdefault(find_pattern(name), []).append((name, parameter, rule))
    for name, buffer in find_buffers(model).items():
        held.setdefault(find_pattern(name), []).append((name, buffer, BUFFERS))
    entries = [entry for pattern, found in held.items() for entry in _build_entries(pattern, found)]
    groups = 1 if dense_mesh is None else axis_size(dense_mesh, DP_REPLICATE_AXIS)
    return PlacementPlan(_find_axis_sizes(sharded, groups), tuple(entries), dense_mesh)


def find_pattern(name: str) -> str:
    """Return a parameter's name with `*` for every number in it."""
    return _NUMBER.sub("*", name)


def describe_plan(plan: PlacementPlan) -> Iterator[str]:
    """Yield a line for each kind (placements, reason, gradient), then one for each of its names."""
    kinds: dict[tuple[str, bool], list[PlacementEntry]] = {}
    for entry in plan.entries:
        kinds.setdefault((entry.rule.kind, entry.is_trained), []).append(entry)
    for (kind, is_trained), entries in kinds.items():
        rule = entries[0].rule
        axes = plan.axis_sizes_of(entries[0])
        where = ", ".join(f"{axis}: {rule.placements[axis]}" for axis in axes)
        gradient = rule.gradient_sum if is_trained else "none"
        yield f"{kind} on {where} ({rule.reason}); gradients summed: {gradient}"
        for entry in entries:
            yield f"  {entry.num_parameters} x {entry.pattern}, {entry.num_elements:,} elements"


def _find_axis_sizes(sharded: ShardedMoE | None, dp_replicate_size: int) -> dict[str, int]:
    of_experts = (EP_AXIS, EXPERT_TP_AXIS)
    inside = {a: 1 if sharded is None else axis_size(sharded.mesh, a) for a in of_experts}
    dp_size = dist.get_world_size() // dp_replicate_size // prod(inside.values())
    sizes = {DP_REPLICATE_AXIS: dp_replicate_size, DP_AXIS: dp_size, **inside}
    return {axis: n for axis, n in sizes.items() if n > 1 or axis in (DP_AXIS, EP_AXIS)}


def _build_entries(
    pattern: str, found: list[tuple[str, Tensor, PlacementRule]]
) -> Iterator[PlacementEntry]:
    """Yield an entry for all names of a pattern, or one a name where these are not of one kind."""
    is_one = len({(rule.kind, tensor.requires_grad) for _, tensor, rule in found}) == 1
    groups = {pattern: found} if is_one else {item[0]: [item] for item in found}
    for names, items in groups.items():
        _, tensor, rule = items[0]
        num_elements = sum(tensor.numel() for _, tensor, _ in items)
        yield PlacementEntry(names, rule, tensor.requires_grad, len(items), num_elements)


def _parameter_names(modules: Mapping[str, nn.Module]) -> set[str]:
    return {f"{path}.{n}" for path, module in modules.items() for n, _ in module.named_parameters()}
