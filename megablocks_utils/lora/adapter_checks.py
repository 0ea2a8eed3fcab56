"""Compare the tensors of an adapter file with what adapters of a model have, before any is read."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.checkpoint.layouts import naming_of_family
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import ADAPTER_WEIGHTS_NAME
from megablocks_utils.lora.adapter_config import AdapterConfigFile
from megablocks_utils.lora.expert_formats import (
    AdapterMatrix,
    ExpertFormat,
    FusedExperts,
    SeparateExperts,
    Shape,
)
from megablocks_utils.lora.peft_format import linear_key
from megablocks_utils.shard_moe_utils import PROJECTIONS, find_expert_modules

__all__ = ["FoundAdapters", "Places", "check_adapter", "find_places"]

# alpha_pattern holds rank * (alpha / r), which rounds.
SCALING_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Places:
    """Say where a model can have adapters, and how files may hold those of its experts.

    Attributes:
        linears: linear layer -> shape (out, in) of its weight.
        experts: parameter of experts -> its shape (E, out, in).
        expert_formats: the formats, each with tensor names of its own.
    """

    linears: Mapping[str, Shape]
    experts: Mapping[str, Shape]
    expert_formats: tuple[ExpertFormat, ...]


@dataclass(frozen=True)
class FoundAdapters:
    """Say where a file has adapters in a model, and in which format it holds those of experts."""

    linears: Mapping[str, Shape]
    experts: Mapping[str, Shape] = field(default_factory=dict)
    expert_format: ExpertFormat | None = None


def find_places(model: PreTrainedModel) -> Places:
    """Find the linear layers of a model, without its output embeddings, and its experts.

    Raises:
        ConfigurationError: the model's family is not supported.
    """
    head = model.get_output_embeddings()
    return Places(
        {
            name: tuple(module.weight.shape)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        },
        {
            f"{name}.{projection}": tuple(getattr(module, projection).shape)
            for name, module in find_expert_modules(model).items()
            for projection in PROJECTIONS
        },
        (FusedExperts(), SeparateExperts(naming_of_family(model.config.model_type))),
    )


def check_adapter(
    config: AdapterConfigFile, index: CheckpointIndex, places: Places
) -> FoundAdapters:
    """Check that a file holds exactly the tensors that adapters of a model have.

    A linear layer, or the experts, must have adapters in all decoder layers or in none; all of one
    kind have the same rank in the file, and all have the same scaling.

    Raises:
        CheckpointError: naming the file, what was seen and what is wanted.
    """
    path = index.folder / ADAPTER_WEIGHTS_NAME
    _refuse_unexpected(path, config, index, places)
    found = _find(path, config, index, places)
    experts = []
    if found.expert_format:
        experts = [*_expert_matrices(found.experts, found.expert_format, config)]
        _refuse_some_projections(path, index, experts)
    matrices = [*_linear_matrices(found.linears, config), *experts]
    _refuse_missing(path, index, matrices)
    ranks: dict[str, int] = {}
    for matrix in matrices:
        wanted_rank = ranks.setdefault(matrix.target, matrix.rank)
        _check_rank_and_alpha(config, matrix, wanted_rank)
        _check_tensor(path, index, matrix)
    return found


def _linear_matrices(
    linears: Mapping[str, Shape], config: AdapterConfigFile
) -> Iterator[AdapterMatrix]:
    r = config.r
    for name, (num_rows, num_columns) in linears.items():
        yield AdapterMatrix(linear_key(name, "A"), (r, num_columns), name, r)
        yield AdapterMatrix(linear_key(name, "B"), (num_rows, r), name, r)


def _expert_matrices(
    experts: Mapping[str, Shape], expert_format: ExpertFormat, config: AdapterConfigFile
) -> Iterator[AdapterMatrix]:
    for name, shape in experts.items():
        yield from expert_format.matrices(name, shape, config)


def _refuse_unexpected(
    path: Path, config: AdapterConfigFile, index: CheckpointIndex, places: Places
) -> None:
    expected = {matrix.key for matrix in _linear_matrices(places.linears, config)}
    for expert_format in places.expert_formats:
        matrices = _expert_matrices(places.experts, expert_format, config)
        expected |= {matrix.key for matrix in matrices}
    unexpected = [key for key in index if key not in expected]
    if unexpected:
        names = ", ".join(sorted({_last_name(name) for name in places.linears}))
        raise CheckpointError(
            f"{path} holds {_count(unexpected)} that this model has no place for, first"
            f" {unexpected[0]}: adapters can be on its experts and on {names}"
        )


def _find(
    path: Path, config: AdapterConfigFile, index: CheckpointIndex, places: Places
) -> FoundAdapters:
    """Return the linear layers and the format of experts of which the file holds any tensor."""
    targets = {m.target for m in _linear_matrices(places.linears, config) if m.key in index}
    linears = {name: shape for name, shape in places.linears.items() if _last_name(name) in targets}
    formats = [
        expert_format
        for expert_format in places.expert_formats
        if any(m.key in index for m in _expert_matrices(places.experts, expert_format, config))
    ]
    if len(formats) > 1:
        labels = " and ".join(expert_format.label for expert_format in formats)
        raise CheckpointError(f"{path} holds adapters of experts in two formats, {labels}")
    if not formats and not linears:
        raise CheckpointError(f"{path} holds no adapters")
    return FoundAdapters(linears, places.experts, formats[0]) if formats else FoundAdapters(linears)


def _refuse_some_projections(
    path: Path, index: CheckpointIndex, matrices: list[AdapterMatrix]
) -> None:
    wanted = dict.fromkeys(matrix.target for matrix in matrices)
    present = {matrix.target for matrix in matrices if matrix.key in index}
    if len(present) < len(wanted):
        raise CheckpointError(
            f"{path} holds adapters on {len(present)} of the {len(wanted)} projections of the"
            f" experts, wanted are all or none: {', '.join(wanted)}"
        )


def _refuse_missing(path: Path, index: CheckpointIndex, matrices: list[AdapterMatrix]) -> None:
    missing = [matrix for matrix in matrices if matrix.key not in index]
    if missing:
        targets = ", ".join(sorted({matrix.target for matrix in missing}))
        raise CheckpointError(
            f"{path} lacks {_count(missing)}, first {missing[0].key}: adapters on {targets} must be"
            " whole and in every layer of this model"
        )


def _check_rank_and_alpha(
    config: AdapterConfigFile, matrix: AdapterMatrix, wanted_rank: int
) -> None:
    """Refuse patterns that give adapters of one kind different ranks, or any another scaling."""
    rank, alpha = config.rank(matrix.module), config.alpha(matrix.module)
    if rank != wanted_rank:
        raise CheckpointError(
            f"{config.path} gives {matrix.module} rank {rank} by rank_pattern, wanted is"
            f" {wanted_rank} as for the others"
        )
    scaling = config.lora_alpha / config.r
    if not math.isclose(alpha / rank, scaling, rel_tol=SCALING_TOLERANCE):
        raise CheckpointError(
            f"{config.path} gives {matrix.module} alpha {alpha:g} and rank {rank}, wanted is the"
            f" quotient of lora_alpha and r, {scaling:g}, for all adapters"
        )


def _check_tensor(path: Path, index: CheckpointIndex, matrix: AdapterMatrix) -> None:
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
