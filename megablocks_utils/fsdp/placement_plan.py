"""The declared plan of a run: how each parameter lies along every mesh axis, why, and its gradient.

It is made of the model as it is before FSDP wraps it. What FSDP then did is compared with it by
`placement_check`: two statements that do not know each other.

An entry's pattern is a name with `*` for every number; where the layers differ in kind, the name.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from megablocks_utils.fsdp.expert_units import shards_over_dp
from megablocks_utils.fsdp.places import find_buffers
from megablocks_utils.mesh.dense_mesh import DENSE_DP_AXIS, TP_AXIS
from megablocks_utils.mesh.device_mesh import (
    DP_AXIS,
    DP_REPLICATE_AXIS,
    EP_AXIS,
    EXPERT_TP_AXIS,
    axis_size,
)
from megablocks_utils.mesh.placement import declare_experts, is_replicated
from megablocks_utils.moe.sharded_moe import ShardedMoE

__all__ = [
    "COPIES",
    "SHARD",
    "PlacementEntry",
    "PlacementPlan",
    "PlacementRule",
    "build_placement_plan",
    "describe_placement",
    "describe_plan",
    "find_pattern",
]

COPIES, SHARD = "copies", "shard"
"""What an axis does with a parameter; a `SHARD` may be of any dim, or followed by which."""

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_ADAPTER = re.compile(r"\.lora_[AB]\.")


@dataclass(frozen=True)
class PlacementRule:
    """How one kind of parameter lies.

    Attributes:
        kind: its name.
        placements: `COPIES`, `SHARD` or what `describe_placement` returns, by mesh axis.
        reason: why it lies so.
        gradient_sum: who sums its gradient over which axes.
    """

    kind: str
    placements: Mapping[str, str]
    reason: str
    gradient_sum: str


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
    kinds = _ExpertKinds(sharded)
    has_tp = dense_mesh is not None and axis_size(dense_mesh, TP_AXIS) > 1
    of_all = set() if sharded is None else _parameter_names(sharded.post_expert_norms)
    held: dict[str, list[tuple[str, Tensor, PlacementRule]]] = {}
    for name, parameter in model.named_parameters():
        splits = has_tp and name not in of_all
        rule = kinds.find(name) or _find_dense_rule(name, parameter, has_tp=splits)
        held.setdefault(find_pattern(name), []).append((name, parameter, rule))
    for name, buffer in find_buffers(model).items():
        held.setdefault(find_pattern(name), []).append((name, buffer, _BUFFERS))
    entries = [entry for pattern, found in held.items() for entry in _build_entries(pattern, found)]
    groups = 1 if dense_mesh is None else axis_size(dense_mesh, DP_REPLICATE_AXIS)
    return PlacementPlan(_find_axis_sizes(sharded, groups), tuple(entries), dense_mesh)


def find_pattern(name: str) -> str:
    """Return a parameter's name with `*` for every number in it."""
    return _NUMBER.sub("*", name)


def describe_placement(placement: Placement) -> str:
    """Say what an axis does with a parameter: `COPIES`, or of which dim the shards are."""
    if placement.is_replicate():
        return COPIES
    # Not `is_shard()`: it denies the strided shards of an expert that FSDP2 sharded over dp.
    dim = getattr(placement, "dim", None)
    return f"{placement!r}" if dim is None else f"{SHARD} of dim {dim}"


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


def _lies(dp_replicate: str, dp: str, ep: str, expert_tp: str) -> Mapping[str, str]:
    return {DP_REPLICATE_AXIS: dp_replicate, DP_AXIS: dp, EP_AXIS: ep, EXPERT_TP_AXIS: expert_tp}


_DENSE = PlacementRule(
    "dense parameters",
    _lies(COPIES, SHARD, SHARD, SHARD),
    "FSDP gathers them for the tokens of each rank",
    "over all axes by FSDP",
)
_ADAPTERS = PlacementRule(
    "adapters of linear layers", _DENSE.placements, _DENSE.reason, _DENSE.gradient_sum
)
_KEPT = PlacementRule(
    "parameters kept in float32",
    _lies(COPIES, COPIES, COPIES, COPIES),
    "FSDP gathers a unit in one dtype",
    "over all axes by an all-reduce once a step",
)
_BUFFERS = PlacementRule("buffers", _KEPT.placements, "FSDP shards parameters only", "none")


_TP_REASON = "ranks of a tp group have the same rows"
_SPLIT = PlacementRule(
    "dense parameters, split",
    {DP_REPLICATE_AXIS: COPIES, DENSE_DP_AXIS: SHARD, TP_AXIS: SHARD},
    f"{_TP_REASON}, each a part of the layer; FSDP gathers it along the other axis",
    "over the other axes by FSDP",
)
_UNSPLIT = PlacementRule(
    "dense parameters",
    {DP_REPLICATE_AXIS: COPIES, DENSE_DP_AXIS: SHARD, TP_AXIS: COPIES},
    f"{_TP_REASON}, and this layer whole; FSDP gathers it along the other axis",
    "over the other axes by FSDP; along tp all have the whole",
)


def _find_dense_rule(name: str, parameter: Tensor, *, has_tp: bool) -> PlacementRule:
    if is_replicated(parameter):
        return _KEPT
    is_adapter = _ADAPTER.search(name) is not None
    if not has_tp:
        return _ADAPTERS if is_adapter else _DENSE
    is_split = isinstance(parameter, DTensor) and not parameter.placements[0].is_replicate()
    rule = _SPLIT if is_split else _UNSPLIT
    return replace(rule, kind=rule.kind.replace(*_DENSE_TO_ADAPTERS)) if is_adapter else rule


_DENSE_TO_ADAPTERS = (_DENSE.kind, _ADAPTERS.kind)


def _parameter_names(modules: Mapping[str, nn.Module]) -> set[str]:
    return {f"{path}.{n}" for path, module in modules.items() for n, _ in module.named_parameters()}


class _ExpertKinds:
    """The rules of expert parameters, by the specs of their modules."""

    def __init__(self, sharded: ShardedMoE | None) -> None:
        self._rules: dict[str, PlacementRule] = {}
        if sharded is None:
            return
        rules = _declare_expert_rules(
            is_sharded_over_dp=shards_over_dp(sharded),
            has_slices=axis_size(sharded.mesh, EXPERT_TP_AXIS) > 1,
        )
        for path, module in sharded.expert_modules.items():
            for name in module.spec.parameter_names:
                is_cut = module.spec.find_split(name) is not None
                self._rules[f"{path}.{name}"] = rules["experts", is_cut]
            for projection in module.spec.projections:
                splits = module.spec.find_lora_splits(projection)
                for factor, split in zip(("lora_A", "lora_B"), splits, strict=True):
                    rule = rules["adapters of experts", split is not None]
                    self._rules[f"{path}.{projection}_lora.{factor}"] = rule

    def find(self, name: str) -> PlacementRule | None:
        """Return the rule of an expert's parameter; None for all else, as a norm behind experts."""
        return self._rules.get(name)


def _declare_expert_rules(
    *, is_sharded_over_dp: bool, has_slices: bool
) -> dict[tuple[str, bool], PlacementRule]:
    """Return the rules of experts and of their adapters, each by whether `expert_tp` cuts them."""
    if is_sharded_over_dp:
        dp, reason = SHARD, "tokens travel to them over ep; FSDP2 shards them again over dp"
        summed = "over ep by the exchange's backward pass, over the other axes by FSDP2"
    else:
        dp, reason = COPIES, "tokens travel to them over ep; along dp all hold the same"
        summed = "over ep by the exchange's backward pass, over the other axes once a step"
    ep = describe_placement(declare_experts(None)[EP_AXIS])
    cut, whole = _lies(COPIES, dp, ep, SHARD), _lies(COPIES, dp, ep, COPIES)
    reasons = {"experts": reason, "adapters of experts": "beside their experts"}
    rules = {}
    for kind, why in reasons.items():
        rules[kind, True] = rules[kind, False] = PlacementRule(kind, cut, why, summed)
        if has_slices:
            rules[kind, False] = PlacementRule(
                f"{kind}, whole on expert_tp",
                whole,
                f"{why}; all slices of an expert have the same",
                f"{summed}, over expert_tp once a step",
            )
    return rules
