"""Rehearse a deep model by few of its layers: layers of one kind all need the same.

Each of the step's moments has a peak that grows evenly with the number of layers of a kind. So one
layer of each kind and the last one are rehearsed, then one more of each kind that is left.
"""

import copy
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from megablocks_utils.mesh.placement import is_replicated, mark_replicated
from megablocks_utils.moe.model_facts import text_config
from megablocks_utils.planning.model.prediction import ParallelLayout, PlannedRun
from megablocks_utils.rehearsal.memory_ledger import LedgerPeak
from megablocks_utils.rehearsal.rehearse import Rehearsal, rehearse
from megablocks_utils.training.describe_model import find_layers

__all__ = ["keep_layers", "rehearse_few_layers"]

_K = TypeVar("_K", bound=Hashable)
_FEWEST = 3
"""Layers at least: FSDP gathers one ahead, and the first and the last are not like the others."""


def rehearse_few_layers(
    model: PreTrainedModel,
    layout: ParallelLayout,
    run: PlannedRun,
    *,
    device: torch.device,
    rank: int = 0,
) -> Rehearsal:
    """Take one step on fake tensors with few layers, and say what all of them would need.

    Args:
        model: on meta, whole; it is left as it is.
        layout: how the experts are spread.
        run: what is planned.
        device: where tensors pretend to be.
        rank: whose step it is.

    Raises:
        UserError: a model or kernel that cannot be run.
    """
    kinds = [_kind_of(layer) for layer in find_layers(model)]
    few = _add_single(_choose(kinds), kinds)
    first = _rehearse(model, few, layout, run, device, rank)
    left = Counter(kinds) - Counter(kinds[index] for index in few)
    more = []
    for kind, count in left.items():
        index = next(i for i, own in enumerate(kinds) if own == kind and i not in few)
        one_more = _rehearse(model, sorted([*few, index]), layout, run, device, rank)
        more.append((count, one_more))
    return _extrapolate(first, more)


def keep_layers(model: PreTrainedModel, indices: Sequence[int]) -> PreTrainedModel:
    """Return a copy of a model with some of its layers.

    Its config still says how many there were: other parts can have a piece for each of them.
    """
    layers = find_layers(model)
    memo: dict[int, object] = {}
    kept = nn.ModuleList(copy.deepcopy(layers[index], memo) for index in indices)
    memo[id(layers)] = kept
    fewer = copy.deepcopy(model, memo)
    for parameter in model.parameters():
        copied = memo.get(id(parameter))
        if isinstance(copied, nn.Parameter) and is_replicated(parameter):
            mark_replicated(copied)  # a copy of a parameter has none of its attributes
    config, number = text_config(fewer), len(layers)
    for index, layer in enumerate(kept):
        for part in layer.modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                vars(part)["layer_idx"] = index
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == number:
            setattr(config, name, [value[index] for index in indices])
    return fewer


def _kind_of(layer: nn.Module) -> Hashable:
    """Return all that decides what a layer needs: parameters, parts, and their settings."""
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    return shapes, tuple((name, *_settings(part)) for name, part in layer.named_modules())


def _settings(part: nn.Module) -> tuple[Hashable, ...]:
    own = {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str) and "idx" not in name and "index" not in name
    }
    return type(part).__name__, tuple(sorted(own.items()))


def _choose(kinds: Sequence[Hashable]) -> list[int]:
    """Return layers of each kind, the first and the last among them."""
    last = len(kinds) - 1
    of_each = {kind: index for index, kind in reversed([*enumerate(kinds)])}
    if kinds[last] != kinds[0]:
        of_each[kinds[last]] = last
    chosen = {*of_each.values(), last}
    for index in range(len(kinds)):
        if len(chosen) >= _FEWEST:
            break
        chosen.add(index)
    return sorted(chosen)


def _add_single(few: list[int], kinds: Sequence[Hashable]) -> list[int]:
    """Add each layer that is the only one left of its kind, which spares a rehearsal."""
    left = Counter(kinds) - Counter(kinds[index] for index in few)
    single = {index for index, kind in enumerate(kinds) if left.get(kind) == 1 and index not in few}
    return sorted({*few, *single})


def _rehearse(
    model: PreTrainedModel,
    indices: Sequence[int],
    layout: ParallelLayout,
    run: PlannedRun,
    device: torch.device,
    rank: int,
) -> Rehearsal:
    return rehearse(keep_layers(model, indices), layout, run, device=device, rank=rank)


def _extrapolate(first: Rehearsal, more: Sequence[tuple[int, Rehearsal]]) -> Rehearsal:
    """Add what so many layers more of each kind need."""
    peaks = []
    for peak in first.peaks:
        others = [(count, _at(one_more, peak.moment)) for count, one_more in more]
        peaks.append(LedgerPeak(_add(peak.components, others), peak.moment))
    sent = [(count, one_more.sent) for count, one_more in more]
    allocated = sum(count * (one.allocated_bytes - first.allocated_bytes) for count, one in more)
    on_host = sum(count * (one.host_bytes - first.host_bytes) for count, one in more)
    return Rehearsal(
        peaks,
        first.allocated_bytes + allocated,
        _add(first.sent, sent),
        first.host_bytes + on_host,
    )


def _at(rehearsal: Rehearsal, moment: str) -> Mapping[str, int]:
    return next(peak.components for peak in rehearsal.peaks if peak.moment == moment)


def _add(first: Mapping[_K, int], more: Sequence[tuple[int, Mapping[_K, int]]]) -> dict[_K, int]:
    total = Counter(first)
    for count, one_more in more:
        for name in {*first, *one_more}:
            total[name] += count * (one_more.get(name, 0) - first.get(name, 0))
    return {name: max(0, size) for name, size in total.items()}
