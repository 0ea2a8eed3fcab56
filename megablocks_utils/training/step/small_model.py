"""A small model of the same class as a real one, on which questions about its forward are tried.

It has the real one's kinds of layers, attention and routers in their order, and few of everything
else. What is small is chosen by the names of the config's fields; a choice with which the class
cannot be built is given up for one nearer to the real config.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.errors import ConfigurationError, UserError

__all__ = ["build_small_model"]

_SEED = 0
_MAX_PARAMETERS = 24_000_000
"""Of a small model: 0.2 s to fill."""
_SCALES = (64, 32, 16, 4, 1)
_MIN_HIDDEN = 64
_MAX_KINDS = 12
"""Kinds of layers; more are no kinds but some number that each layer has."""

_HEADS = re.compile(r"(?!.*index).*(heads|n_groups|o_groups)")
_HEADS_FIELD = "num_attention_heads"
_HEAD_SIZE = re.compile(r".*head_(dim|size)|kv_channels")
_HIDDEN = re.compile(r"(.*_)?(hidden_size|d_model|n_embd|embed_dim)")
_FEED_FORWARD = re.compile(
    r".*(intermediate_size|ffn_hidden_size|ffn_dim|moe_hidden_size|latent_size|lora_rank).*"
    r"|hidden_size_per_layer_input"
)
_WINDOWS = re.compile(r"(.*_)?(sliding_window|sliding_window_size|window_size|chunk_size)")
_COMPRESSION = re.compile(r".*(compress_r|kpool|index_block_size).*")
_EXPERTS = re.compile(r"(moe_)?(num_experts|num_local_experts|n_routed_experts)")
_VOCABULARY = re.compile(r".*vocab_size.*")
_NUM_LAYERS = re.compile(r"num_hidden_layers|num_layers|n_layers?|depth")
_INDEX_HEADS = re.compile(r"index.*heads")
_PLACE = re.compile(r".*(idx|index|layer_id|layer_number)")


@dataclass(frozen=True)
class _Reduction:
    """How small a config is made.

    Attributes:
        scale: what the hidden size and the numbers of heads are divided by.
        num_layers: first layers that are kept.
        has_all_experts: whether there are as many experts as in the real model.
        has_small_windows: whether windows, chunks and what is compressed to one are shorter than
            the examples of a probe.
    """

    scale: int
    num_layers: int
    has_all_experts: bool = False
    has_small_windows: bool = True

    def value(self, name: str, value: int) -> int:
        """Return the small value of a field."""
        if _NUM_LAYERS.fullmatch(name):
            return min(value, self.num_layers)
        if _VOCABULARY.fullmatch(name):
            return min(value, 256)
        if _FEED_FORWARD.fullmatch(name):
            return min(value, 32)
        if _WINDOWS.fullmatch(name) and self.has_small_windows:
            return min(value, 16 if "chunk" in name else 8)
        if _COMPRESSION.fullmatch(name) and self.has_small_windows:
            return min(value, 4)
        if _EXPERTS.fullmatch(name) and not self.has_all_experts:
            return min(value, 32)
        if _HIDDEN.fullmatch(name) or _HEADS.fullmatch(name):
            return _divide(value, self.scale)
        return 0 if name.endswith("_token_id") and value >= 256 else value


def build_small_model(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Build a small model of a model's class, its attention implementation too, in fp32.

    Global random numbers stay as they are.

    Args:
        model: only its config and its structure are looked at; it may be on meta.
        device: where the small one computes.

    Raises:
        ConfigurationError: none can be built.
    """
    reasons: list[str] = []
    for reduction in _reductions(model):
        try:
            with torch.random.fork_rng(devices=[]), ForeignCode(_unusable):
                small = _build(model, reduction)
        except UserError as error:
            reasons.append(str(error))
            continue
        if small is not None:
            nn.Module.to(small, device)  # transformers' own has another signature
            return small
    raise ConfigurationError(
        f"no small model of {type(model).__name__} can be built to try what its forward does: "
        f"{reasons[-1] if reasons else 'it has too many parameters'}."
    )


def _unusable(reason: str) -> UserError:
    return ConfigurationError(reason)


def _reductions(model: PreTrainedModel) -> Iterator[_Reduction | None]:
    """Yield what is tried, the smallest first, and last the config as it is."""
    config = model.config.get_text_config()
    layers = _find_layers(model)
    num_kinds = _count_needed(layers, config)
    fitting = [s for s in _SCALES if s == 1 or config.hidden_size // s >= _MIN_HIDDEN]
    for num_layers in dict.fromkeys((num_kinds, len(layers))):
        for scale in fitting:
            yield _Reduction(scale, num_layers)
        for scale in (fitting[0], 1):
            yield _Reduction(scale, num_layers, has_all_experts=True, has_small_windows=False)
    yield None


def _build(model: PreTrainedModel, reduction: _Reduction | None) -> PreTrainedModel | None:
    """Build one; None if it would be too large."""
    config = _reduce_config(model.config, reduction, len(_find_layers(model)))
    kinds: dict[str, Any] = {
        "attn_implementation": _attention_of(model.config),
        "dtype": torch.float32,
    }
    with torch.device("meta"):
        on_meta = type(model)._from_config(config, **kinds)
    if sum(parameter.numel() for parameter in on_meta.parameters()) > _MAX_PARAMETERS:
        return None
    small = type(model)._from_config(config, **kinds)
    small.config._experts_implementation = "eager"
    small.config.get_text_config()._experts_implementation = "eager"
    _fill(small)
    with torch.no_grad():
        small.eval()(input_ids=torch.arange(4)[None], use_cache=False)
    return small


def _attention_of(config: PreTrainedConfig) -> dict[str, str]:
    """Return the attention implementation of a model, and of the models within it by name."""
    inner = {name: getattr(config, name, None) for name in config.sub_configs}
    return {"": config._attn_implementation} | {
        name: sub._attn_implementation for name, sub in inner.items() if sub is not None
    }


def _reduce_config(
    config: PreTrainedConfig, reduction: _Reduction | None, num_layers: int
) -> PreTrainedConfig:
    if reduction is None:
        return copy.deepcopy(config)
    values = config.to_dict()
    for name in ("quantization_config", "dtype", "torch_dtype"):
        values.pop(name, None)
    return type(config).from_dict(_reduce(config, values, num_layers, reduction))


def _reduce(
    config: PreTrainedConfig,
    values: Mapping[str, Any],
    num_layers: int,
    reduction: _Reduction,
) -> dict[str, Any]:
    """Return a config's values made small, those of configs within it too."""
    reduced = dict(values)
    head_size = _head_size(values)
    own = [v for n, v in values.items() if _NUM_LAYERS.fullmatch(n) and type(v) is int]
    lengths = {num_layers, *own} - {1}
    index_heads = [v for n, v in values.items() if _INDEX_HEADS.fullmatch(n)]
    for name, value in values.items():
        inner = getattr(config, name, None) if name in config.sub_configs else None
        if isinstance(inner, PreTrainedConfig):
            reduced[name] = _reduce(inner, value, num_layers, reduction)
        elif isinstance(value, int) and not isinstance(value, bool):
            reduced[name] = reduction.value(name, value)
            # Scores of a few heads are often equal, and then any of them may be chosen.
            is_small = reduction.has_small_windows and min(index_heads, default=0) >= 8
            if name == "index_topk" and is_small:
                reduced[name] = min(value, 8)
            if head_size and _HIDDEN.fullmatch(name) and value == values["hidden_size"]:
                reduced[name] = head_size * reduction.value(_HEADS_FIELD, values[_HEADS_FIELD])
        elif _is_per_layer(name, value) and len(value) in lengths:
            reduced[name] = value[: reduction.num_layers]
        elif isinstance(value, dict) and "per_layer" in name:
            kept = min(reduction.num_layers, num_layers)
            reduced[name] = {
                key: _reduce_numbers(v, reduction) for key, v in value.items() if int(key) < kept
            }
        elif isinstance(value, dict) and _COMPRESSION.fullmatch(name):
            reduced[name] = {key: reduction.value(name, v) for key, v in value.items()}
        elif isinstance(value, list) and _FEED_FORWARD.fullmatch(name):
            reduced[name] = [reduction.value(name, item) for item in value]
    return reduced


def _reduce_numbers(settings: object, reduction: _Reduction) -> object:
    """Return the settings of one layer made small; anything else as it is."""
    if not isinstance(settings, dict):
        return settings
    return {n: reduction.value(n, v) if type(v) is int else v for n, v in settings.items()}


def _head_size(values: Mapping[str, Any]) -> int | None:
    """Return the size of a head that follows from others, and that rotary sections must fit."""
    hidden_size, num_heads = values.get("hidden_size"), values.get(_HEADS_FIELD)
    if not hidden_size or not num_heads or hidden_size % num_heads:
        return None
    is_told = any(value for name, value in values.items() if _HEAD_SIZE.fullmatch(name))
    return None if is_told else hidden_size // num_heads


def _is_per_layer(name: str, value: object) -> TypeGuard[Sequence[object]]:
    """Say whether a value may tell something of each layer: a list, or a word of letters."""
    return isinstance(value, list | tuple) or (isinstance(value, str) and "pattern" in name)


def _divide(number: int, scale: int) -> int:
    """Return the largest divisor of a number that is at most a `scale`-th of it."""
    return next((n for n in range(max(1, number // scale), 0, -1) if number % n == 0), number)


def _find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers: the list of modules with most of the parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigurationError(f"{type(model).__name__} has no list of layers.")
    return max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()))


def _count_needed(layers: nn.ModuleList, config: PreTrainedConfig) -> int:
    """Return how many first layers have every kind of layer among them."""
    listed = [
        value
        for name, value in config.to_dict().items()
        if _is_per_layer(name, value) and len(value) == len(layers)
    ]
    listed = [value for value in listed if len(set(map(str, value))) <= _MAX_KINDS]
    kinds = [(_describe(layer), tuple(str(v[i]) for v in listed)) for i, layer in enumerate(layers)]
    if len(set(kinds)) > _MAX_KINDS:
        kinds = [
            (_describe_classes(layer), told) for layer, (_, told) in zip(layers, kinds, strict=True)
        ]
    needed = max((kinds.index(kind) for kind in kinds), default=0) + 1
    return min(max(2, needed), len(layers))


def _describe(layer: nn.Module) -> str:
    """Describe what a layer is: its modules' classes, and the settings they hold."""
    settings = [
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | None)
        and not key.startswith("_")
        and not _PLACE.fullmatch(key)
    ]
    return f"{_describe_classes(layer)} {settings}"


def _describe_classes(layer: nn.Module) -> str:
    return str([(name, type(module).__name__) for name, module in layer.named_modules()])


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Give matrices values that matter; vectors keep the values they are made with."""
    generator = torch.Generator().manual_seed(_SEED)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dim() > 1 and parameter.requires_grad:
                fan_in = 1 if isinstance(module, nn.Embedding) else parameter.shape[-1]
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / math.sqrt(fan_in))
