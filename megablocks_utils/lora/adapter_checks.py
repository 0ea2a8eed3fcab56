"""Compare the tensors of an adapter file with what adapters of a model have, before any is read."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from megablocks_utils.lora.adapter_config import AdapterConfigFile
from megablocks_utils.lora.adapter_places import Places, find_places, weight_of
from megablocks_utils.lora.expert_formats import (
    AdapterMatrix,
    ExpertFormat,
    FusedExperts,
    SeparateExperts,
)
from megablocks_utils.lora.peft_format import (
    ExpertPlace,
    Shape,
    linear_key,
    linear_matrices,
)
from megablocks_utils.lora.peft_targets import PeftTarget, find_peft_targets
from megablocks_utils.lora.replaced_weights import find_replaced
from megablocks_utils.lora.single_experts import SingleExpertNames

__all__ = ["FoundAdapter", "FoundAdapters", "check_adapter"]


@dataclass(frozen=True)
class FoundAdapter:
    """Describe one adapter of a file.

    Attributes:
        shape: of the weight, (out, in) of a linear layer or (E, out, in) of experts.
        rank: in memory; gate and up of separate experts lie side by side.
        scaling: factor of B @ A.
        is_parameter: whether PEFT adds it to a parameter, as to those of experts and routers: it
            rounds what it adds, too.
        is_transposed: whether it is one of experts that are stored (E, in, out).
        num_stored: experts that the file has it for: E, or more where a parameter has rows for
            experts that compute nothing.
    """

    shape: Shape
    rank: int
    scaling: float
    is_parameter: bool
    is_transposed: bool = False
    num_stored: int = 1


@dataclass(frozen=True)
class FoundAdapters:
    """Say where a file has adapters in a model, and in which format it holds those of experts.

    Attributes:
        linears: by the name of the linear layer or router.
        experts: by the name of the parameter.
        expert_format: None where there are none of experts.
        replaced: parameter or buffer of the model -> tensor of the file that replaces it whole.
    """

    linears: Mapping[str, FoundAdapter]
    experts: Mapping[str, FoundAdapter]
    expert_format: ExpertFormat | None
    replaced: Mapping[str, str]


def check_adapter(
    config: AdapterConfigFile, index: CheckpointIndex, model: PreTrainedModel
) -> FoundAdapters:
    """Check that a file holds what PEFT would read of it, whole, and nothing else.

    A kind of linear layer, or a projection of experts, must have adapters wherever the
    configuration targets it, or nowhere: without one, PEFT's own adapter adds zero.

    Raises:
        CheckpointError: naming the file, what was seen and what is wanted.
    """
    path = index.folder / ADAPTER_WEIGHTS_NAME
    places, targets = find_places(model), find_peft_targets(config, model)
    replaced = find_replaced(config, index, model)
    linears = {n: x for n, x in places.linears.items() if {n, weight_of(n)} & targets.keys()}
    linears |= {n: shape for n, shape in places.routers.items() if weight_of(n) in targets}
    experts = {name: place for name, place in places.experts.items() if name in targets}
    of_linears = [
        matrix
        for name, shape in linears.items()
        for matrix in linear_matrices(name, shape, _target_of(targets, name).rank)
    ]
    fused = FusedExperts({name: target.key for name, target in targets.items()}, places.experts)
    matrices: dict[ExpertFormat, list[AdapterMatrix]] = {fused: _matrices(fused, experts, targets)}
    known = _known_keys(places)
    separate = None
    if index.keys() - {m.key for m in (*of_linears, *matrices[fused])} - {*replaced.values()}:
        separate = SeparateExperts(SingleExpertNames(model), config.r)
        matrices[separate] = _matrices(separate, _in_targeted_layers(experts, config), targets)
        known |= {m.key for name in places.experts for m in separate.matrices(name, 1)}
    formats = [f for f, found in matrices.items() if any(matrix.key in index for matrix in found)]
    if len(formats) > 1:
        labels = " and ".join(expert_format.label for expert_format in formats)
        raise CheckpointError(f"{path} holds adapters of experts in two formats, {labels}")
    used = [*of_linears, *(matrices[formats[0]] if formats else ())]
    unread = [key for key in index if key not in {m.key for m in used} | {*replaced.values()}]
    _refuse_unread(config, index, unread, known, places)
    present = _refuse_missing(index, used)
    for matrix in used:
        if matrix.key in index:
            _check_tensor(index, matrix)
    if not present and not replaced:
        raise CheckpointError(f"{path} holds no adapters")
    if separate is not None and formats == [separate]:
        _refuse_separate_patterns(config, targets, experts)
    return FoundAdapters(
        _found(linears, targets, present),
        _found_experts(experts, targets, present),
        formats[0] if formats else None,
        replaced,
    )


def _matrices(
    expert_format: ExpertFormat, experts: Iterable[str], targets: Mapping[str, PeftTarget]
) -> list[AdapterMatrix]:
    return [m for name in experts for m in expert_format.matrices(name, targets[name].rank)]


def _found(
    shapes: Mapping[str, Shape], targets: Mapping[str, PeftTarget], present: Collection[str]
) -> dict[str, FoundAdapter]:
    return {
        name: FoundAdapter(shape, target.rank, target.scaling, is_parameter=target.is_parameter)
        for name, shape in shapes.items()
        if name in present and (target := _target_of(targets, name))
    }


def _found_experts(
    places: Mapping[str, ExpertPlace], targets: Mapping[str, PeftTarget], present: Collection[str]
) -> dict[str, FoundAdapter]:
    found = _found({name: place.shape for name, place in places.items()}, targets, present)
    return {
        name: replace(
            adapter,
            is_transposed=places[name].is_transposed,
            num_stored=places[name].num_stored,
        )
        for name, adapter in found.items()
    }


def _target_of(targets: Mapping[str, PeftTarget], name: str) -> PeftTarget:
    """Return what PEFT attaches to a linear layer, to a parameter, or to a router's weight."""
    return targets[name] if name in targets else targets[weight_of(name)]


def _in_targeted_layers(
    experts: Mapping[str, ExpertPlace], config: AdapterConfigFile
) -> Mapping[str, ExpertPlace]:
    """Return the experts that `layers_to_transform` names, which PEFT's conversion passes over."""
    layers = config.targeting["layers_to_transform"]
    if layers is None:
        return experts
    wanted = layers if isinstance(layers, list) else [layers]
    return {name: place for name, place in experts.items() if _layer_number(name) in wanted}


def _layer_number(name: str) -> int | None:
    match = re.search(r"\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def _refuse_unread(
    config: AdapterConfigFile,
    index: CheckpointIndex,
    unread: Sequence[str],
    known: Collection[str],
    places: Places,
) -> None:
    """Refuse tensors that PEFT would drop: without a place in the model, or not targeted."""
    if not unread:
        return
    held = f"{index.folder / ADAPTER_WEIGHTS_NAME} holds {_count(unread)}"
    without_place = [key for key in unread if key not in known]
    if not without_place:
        raise CheckpointError(
            f"{held} that the targets in {ADAPTER_CONFIG_NAME} leave out, first {unread[0]}"
        )
    names = ", ".join(sorted({_last_name(name) for name in places.linears}))
    version = "" if config.peft_version is None else f" (PEFT {config.peft_version} wrote it)"
    raise CheckpointError(
        f"{held} that this model has no place for, first {without_place[0]}: adapters can be on its"
        f" experts and on {names}{version}"
    )


def _known_keys(places: Places) -> set[str]:
    """Return the names that tensors have if all linear layers and experts have adapters."""
    modules = {*places.linears, *(name.rpartition(".")[0] for name in places.experts)}
    inner = {f"{name.rpartition('.')[0]}.base_layer" for name in places.experts}
    return {linear_key(name, side) for name in modules | inner for side in "AB"}


def _refuse_missing(index: CheckpointIndex, matrices: Iterable[AdapterMatrix]) -> set[str]:
    """Return the weights that have adapters in the file, having seen that none is half there."""
    matrices = list(matrices)
    present = {matrix.target for matrix in matrices if matrix.key in index}
    missing = [m for m in matrices if m.target in present and m.key not in index]
    if missing:
        targets = ", ".join(sorted({matrix.target for matrix in missing}))
        raise CheckpointError(
            f"{index.folder / ADAPTER_WEIGHTS_NAME} lacks {_count(missing)}, first"
            f" {missing[0].key}: adapters on {targets} must be whole and in every layer that"
            f" {ADAPTER_CONFIG_NAME} names"
        )
    return {matrix.name for matrix in matrices if matrix.key in index}


def _refuse_separate_patterns(
    config: AdapterConfigFile, targets: Mapping[str, PeftTarget], experts: Iterable[str]
) -> None:
    """Refuse strengths of separate experts that PEFT's conversion does not keep."""
    if config.use_rslora:
        raise CheckpointError(
            f"{config.path} sets use_rslora for adapters of single experts, whose strength PEFT"
            " changes where it joins gate and up"
        )
    scaling = config.lora_alpha / config.r
    for name in experts:
        if abs(targets[name].scaling - scaling) > 1e-9 * scaling:
            raise CheckpointError(
                f"{config.path} gives {name} a strength of {targets[name].scaling:g} by its"
                f" patterns, wanted is {scaling:g} for adapters of single experts"
            )


def _check_tensor(index: CheckpointIndex, matrix: AdapterMatrix) -> None:
    path = index.folder / ADAPTER_WEIGHTS_NAME
    shape, dtype = index.shape(matrix.key), index.dtype(matrix.key)
    if shape != matrix.shape:
        raise CheckpointError(
            f"{matrix.key} in {path} has shape {shape}, wanted is {matrix.shape} by the model's"
            f" sizes and rank {matrix.rank} of the adapter's configuration"
        )
    if not dtype.is_floating_point:
        raise CheckpointError(
            f"{matrix.key} in {path} has dtype {dtype}, wanted is one of floating point"
        )


def _last_name(name: str) -> str:
    return name.rpartition(".")[2]


def _count(items: Collection[object]) -> str:
    return f"{len(items)} {'tensor' if len(items) == 1 else 'tensors'}"
