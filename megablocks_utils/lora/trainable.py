"""Which adapters of a file can be trained on: one rank and one strength, in every layer."""

import math
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from transformers import PreTrainedModel

from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import ADAPTER_WEIGHTS_NAME
from megablocks_utils.lora.adapter_checks import FoundAdapter
from megablocks_utils.lora.adapter_places import find_places
from megablocks_utils.lora.adapter_reader import AdapterReader
from megablocks_utils.lora.linear_choice import list_weights, target_ends
from megablocks_utils.lora.peft_targets import split_by_reach
from megablocks_utils.lora.settings import LoraSettings

__all__ = ["settings_of_adapter"]

# alpha_pattern holds rank * (alpha / r), which rounds.
_SCALING_TOLERANCE = 1e-9


def settings_of_adapter(reader: AdapterReader, model: PreTrainedModel) -> LoraSettings:
    """Return the settings with which a run trains the adapters of a file further.

    Raises:
        CheckpointError: it has adapters in some layers only, of several ranks or strengths, or
            trained weights besides adapters.
    """
    path, config, found = reader.index.folder / ADAPTER_WEIGHTS_NAME, reader.config, reader.found
    if found.replaced:
        raise CheckpointError(
            f"{path} also holds {next(iter(found.replaced.values()))}: only adapters are trained"
            " further; merge the file into its base instead"
        )
    if config.use_rslora:
        raise CheckpointError(
            f"{config.path} sets use_rslora, but adapters are trained with the strength lora_alpha"
            " / r here; merge the file into its base instead"
        )
    places = find_places(model)
    if found.experts and len(found.experts) < len(places.experts):
        raise CheckpointError(
            f"{path} holds adapters on {len(found.experts)} of the {len(places.experts)} weights of"
            f" experts, wanted are all or none: {', '.join(_last_names(places.experts))}"
        )
    kinds = {_kind(name) for name in found.linears}
    all_places = [*places.linears, *places.routers]
    missing = [n for n in all_places if _kind(n) in kinds and n not in found.linears]
    if missing:
        raise CheckpointError(
            f"{path} holds no adapter on {missing[0]}, but on others of this kind: only adapters in"
            " every layer are trained further"
        )
    _check_strengths(reader, config.lora_alpha / config.r)
    _check_ranks(reader, found.linears, config.r)
    ranks: dict[str, int] = {}
    for name, adapter in found.experts.items():
        wanted = ranks.setdefault(_last_name(name), adapter.rank)
        _check_ranks(reader, {name: adapter}, wanted)
    routers = [name for name in found.linears if name in places.routers]
    modules, weights = split_by_reach(model, [n for n in found.linears if n not in routers])
    ends = target_ends(model, routers, list_weights(model))
    return LoraSettings(
        config.r, config.lora_alpha, modules, MappingProxyType(ranks), weights, ends
    )


def _check_ranks(reader: AdapterReader, adapters: Mapping[str, FoundAdapter], wanted: int) -> None:
    for name, adapter in adapters.items():
        if adapter.rank != wanted:
            raise CheckpointError(
                f"{reader.config.path} gives {name} rank {adapter.rank} by rank_pattern, wanted is"
                f" {wanted} as for the others"
            )


def _check_strengths(reader: AdapterReader, wanted: float) -> None:
    for name, adapter in {**reader.linears, **reader.expert_parameters}.items():
        if not math.isclose(adapter.scaling, wanted, rel_tol=_SCALING_TOLERANCE):
            raise CheckpointError(
                f"{reader.config.path} gives {name} the strength {adapter.scaling:g}, wanted is"
                f" that of lora_alpha and r, {wanted:g}, for all adapters"
            )


def _kind(name: str) -> str:
    """Return the name of a layer without its numbers: the same in all decoder layers."""
    return re.sub(r"\.\d+(?=\.)", "", name)


def _last_name(name: str) -> str:
    return name.rpartition(".")[2]


def _last_names(names: Iterable[str]) -> list[str]:
    return sorted({_last_name(name) for name in names})
