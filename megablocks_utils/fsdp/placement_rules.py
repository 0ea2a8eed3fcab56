"""How each kind of parameter lies along every mesh axis, why, and who sums its gradient."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement

from megablocks_utils.fsdp.expert_units import shards_over_dp
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

__all__ = ["BUFFERS", "COPIES", "SHARD", "ExpertRules", "PlacementRule", "describe_placement"]
__all__ += ["find_dense_rule"]

COPIES, SHARD = "copies", "shard"
"""What an axis does with a parameter; a `SHARD` may be of any dim, or followed by which."""

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


def describe_placement(placement: Placement) -> str:
    """Say what an axis does with a parameter: `COPIES`, or of which dim the shards are."""
    if placement.is_replicate():
        return COPIES
    # Not `is_shard()`: it denies the strided shards of an expert that FSDP2 sharded over dp.
    dim = getattr(placement, "dim", None)
    return f"{placement!r}" if dim is None else f"{SHARD} of dim {dim}"


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
BUFFERS = PlacementRule("buffers", _KEPT.placements, "FSDP shards parameters only", "none")
"""Of buffers that are saved with the model."""
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


def find_dense_rule(name: str, parameter: Tensor, *, has_tp: bool) -> PlacementRule:
    """Return how a parameter lies that is no expert's; `has_tp` where its layer may be split."""
    if is_replicated(parameter):
        return _KEPT
    is_adapter = _ADAPTER.search(name) is not None
    if not has_tp:
        return _ADAPTERS if is_adapter else _DENSE
    is_split = isinstance(parameter, DTensor) and not parameter.placements[0].is_replicate()
    rule = _SPLIT if is_split else _UNSPLIT
    if not is_adapter:
        return rule
    return replace(rule, kind=rule.kind.replace(_DENSE.kind, _ADAPTERS.kind))


class ExpertRules:
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
