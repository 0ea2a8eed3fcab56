"""LoRA: freeze the model and attach adapters to attention, experts, or all linear layers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from megablocks_utils.config import AdapterConfig
from megablocks_utils.config.adapter import ATTENTION, EXPERTS, LM_HEAD, ROUTER, SHARED
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.lora.adapter_reader import AdapterReader, open_adapter
from megablocks_utils.lora.expert_adapters import attach_expert_lora, lora_name
from megablocks_utils.lora.linear_adapters import attach_linear_lora, attach_router_lora
from megablocks_utils.lora.linear_choice import (
    find_dense_linears,
    find_mixer_linears,
    has_end,
    list_weights,
    target_ends,
)
from megablocks_utils.lora.peft_targets import find_loadable, split_by_reach
from megablocks_utils.lora.router_choice import find_head, find_router_modules
from megablocks_utils.lora.settings import LoraSettings, same_rank_everywhere
from megablocks_utils.lora.trainable import settings_of_adapter
from megablocks_utils.mesh.placement import cut_slice, local_tensor
from megablocks_utils.moe.expert_spec import find_expert_modules
from megablocks_utils.moe.sharded_moe import ShardedMoE

_ADAPTER_NAME = "default"


@dataclass(frozen=True)
class ChosenAdapters:
    """Say which adapters a run trains.

    Attributes:
        settings: which modules, ranks and scaling.
        source: trained adapters to start from; None for new ones.
    """

    settings: LoraSettings
    source: AdapterReader | None = None


def choose_adapters(model: PreTrainedModel, adapter: AdapterConfig) -> ChosenAdapters:
    """Choose the adapters of a run, before any weight is read.

    Raises:
        CheckpointError: the adapter to start from cannot be read or does not fit the model.
        ConfigurationError: it contradicts the config, or the config says no rank or strength for
            new adapters, or the model has no attention for them.
    """
    if adapter.resume_adapter is None:
        return ChosenAdapters(_new_settings(model, adapter))
    reader = open_adapter(adapter.resume_adapter, model)
    settings = replace(settings_of_adapter(reader, model), dropout=adapter.lora_dropout)
    _check_agreement(adapter, settings, model)
    return ChosenAdapters(settings, reader)


def _new_settings(model: PreTrainedModel, adapter: AdapterConfig) -> LoraSettings:
    if adapter.lora_r is None or adapter.lora_alpha is None:
        raise ConfigurationError(
            "new adapters need lora_r and lora_alpha, but the config has None.",
            parameters=("lora_r", "lora_alpha"),
        )
    ranks: Mapping[str, int] = {}
    if adapter.trains_experts:
        _check_experts_are_loadable(model, adapter)
        ranks = same_rank_everywhere(adapter.lora_r, model)
    chosen = _choose_linears(model, adapter)
    modules, weights = split_by_reach(model, [n for n in chosen if not _is_router(model, n)])
    routers = target_ends(model, [n for n in chosen if _is_router(model, n)], list_weights(model))
    return LoraSettings(
        adapter.lora_r,
        adapter.lora_alpha,
        modules,
        ranks,
        weights,
        routers,
        adapter.lora_dropout,
    )


def _check_experts_are_loadable(model: PreTrainedModel, adapter: AdapterConfig) -> None:
    modules = find_expert_modules(model)
    lost = modules.keys() - find_loadable(model, modules)
    if lost:
        others = "none or attn-only" if find_loadable(model, find_mixer_linears(model)) else "none"
        raise ConfigurationError(
            f"{adapter.option} is {adapter.named}, but PEFT {peft.__version__} would not find "
            f"adapters on {min(lost)} again when it loads them; use_lora must be {others} for "
            f"model type {model.config.model_type}.",
            parameters=(adapter.option,),
        )


def _choose_linears(model: PreTrainedModel, adapter: AdapterConfig) -> list[str]:
    """Return the linear layers, and the routers of classes of their own, that get adapters.

    Raises:
        ConfigurationError: a part that is asked for by name has none that PEFT can load.
    """
    chosen: list[str] = []
    for part, what in _LINEAR_PARTS.items():
        if part not in adapter.parts:
            continue
        found = find_loadable(model, _find_part(model, part))
        if not found and not (part == SHARED and adapter.lora_target is None):
            raise ConfigurationError(
                f"{adapter.option} {adapter.named} needs {what} whose adapters PEFT can load, "
                f"but model type {model.config.model_type} has none.",
                parameters=(adapter.option,),
            )
        chosen += found
    return list(dict.fromkeys(chosen))


_LINEAR_PARTS = {
    ATTENTION: "linear layers in the attention",
    SHARED: "linear layers in shared experts or dense MLPs",
    ROUTER: "routers that are called as they are,",
    LM_HEAD: "an output head of its own (not tied to the embeddings)",
}


def _find_part(model: PreTrainedModel, part: str) -> list[str]:
    if part == LM_HEAD:
        return [name for name in [find_head(model)] if name is not None]
    finders = {ATTENTION: find_mixer_linears, SHARED: find_dense_linears}
    return (finders | {ROUTER: find_router_modules})[part](model)


def _is_router(model: PreTrainedModel, name: str) -> bool:
    """Say whether a module is a router of a class of its own, no linear layer."""
    return not isinstance(model.get_submodule(name), nn.Linear)


def _check_agreement(
    adapter: AdapterConfig, settings: LoraSettings, model: PreTrainedModel
) -> None:
    """Refuse a config that contradicts the adapter to start from."""
    found = {name for name, _ in model.named_modules() if has_end(name, settings.all_ends)}
    parts = [part for part in _LINEAR_PARTS if found.intersection(_find_part(model, part))]
    parts += [EXPERTS] * bool(settings.expert_ranks)
    own: dict[str, object] = {"lora_r": settings.r, "lora_alpha": settings.lora_alpha}
    if adapter.lora_target is not None or {ROUTER, LM_HEAD}.intersection(parts):
        if {*adapter.parts} != {*parts}:
            raise ConfigurationError(
                f"{adapter.option} is {adapter.named}, but the adapter {adapter.resume_adapter} "
                f"is on lora_target {','.join(parts)}.",
                parameters=(adapter.option,),
            )
    else:
        kinds = {(True, False): "attn-only", (False, True): "mlp-only", (True, True): "all"}
        own["use_lora"] = kinds[bool(settings.all_ends), bool(settings.expert_ranks)]
    for name, value in own.items():
        given = getattr(adapter, name)
        if given is not None and given != value:
            raise ConfigurationError(
                f"{name} is {given}, but the adapter {adapter.resume_adapter} has {value}.",
                parameters=(name,),
            )


def apply_lora(
    model: nn.Module,
    sharded: ShardedMoE | None,
    adapters: ChosenAdapters,
    *,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Freeze the model and attach adapters, in place; nothing else of it is trained.

    Call it before FSDP wraps the model, so that the adapters are sharded like everything else. No
    communication: every rank makes or reads its own part.

    Args:
        model: the transformers model.
        sharded: what `shard_moe` returned; needed for adapters on experts.
        adapters: which, from `choose_adapters`.
        dtype: in which they are kept and trained.
        seed: of new ones; equal on all ranks.

    Raises:
        CheckpointError: adapters to start from that are not finite.
        ConfigurationError: adapters on experts without `sharded`, or whose backend has none.
    """
    settings = adapters.settings
    if settings.expert_ranks and sharded is None:
        raise ConfigurationError(
            "sharded is None, but adapters on experts need what shard_moe returned.",
            parameters=("sharded",),
        )
    model.requires_grad_(False)
    if settings.linear_ends:
        attach_linear_lora(model, settings, dtype=dtype, seed=seed)
    if settings.router_weights:
        attach_router_lora(model, settings, dtype=dtype, seed=seed)
    if sharded is not None and settings.expert_ranks:
        attach_expert_lora(sharded, settings, dtype=dtype, seed=seed)
    if adapters.source is not None:
        _fill(model, sharded, settings, adapters.source)


@torch.no_grad()
def _fill(
    model: nn.Module, sharded: ShardedMoE | None, settings: LoraSettings, source: AdapterReader
) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            lora_a, lora_b = source.linear(name)
            module.lora_A[_ADAPTER_NAME].get_parameter("weight").copy_(lora_a)
            module.lora_B[_ADAPTER_NAME].get_parameter("weight").copy_(lora_b)
    if sharded is None:
        return
    for name, module in sharded.expert_modules.items():
        mine = module.local_experts()
        span = range(min(mine), max(mine) + 1)
        places = [expert - span.start for expert in mine]
        for projection in module.spec.projections if settings.expert_ranks else ():
            lora = getattr(module, lora_name(projection))
            factors = [f[places] for f in source.experts(f"{name}.{projection}", span)]
            splits = module.spec.find_lora_splits(projection)
            for own, factor, split in zip((lora.lora_A, lora.lora_B), factors, splits, strict=True):
                local_tensor(own.detach()).copy_(cut_slice(factor, sharded.mesh, split))
