"""Facts of a model that other families call by other names, or hold deeper down in their configs.

The config of a model that also sees or hears holds that of its text model inside it.
"""

from typing import Any

from torch import nn

from megablocks_utils.moe.expert_spec import find_expert_modules

__all__ = ["find_top_k", "num_layers", "text_config", "vocab_size"]

# What routers and configs call the number of experts of a token.
_TOP_K = ("top_k", "num_experts_per_tok", "num_experts_per_token", "top_k_experts")


def text_config(model_or_config: Any) -> Any:
    """Return the config of the text model; the given one where there is no other."""
    config = getattr(model_or_config, "config", model_or_config)
    return config.get_text_config(decoder=True)


def vocab_size(model_or_config: Any) -> int:
    """Return how many tokens the text model knows."""
    return text_config(model_or_config).vocab_size


def num_layers(model: nn.Module) -> int:
    """Return how many decoder layers the text model has, counted where its experts are.

    A config may count otherwise: of a layer with two attentions, both.
    """
    for name in find_expert_modules(model):
        path = name.split(".")
        parts = (model.get_submodule(".".join(path[:n])) for n in range(1, len(path)))
        for part in parts:
            if isinstance(part, nn.ModuleList):
                return len(part)
    return text_config(model).num_hidden_layers


def find_top_k(model: nn.Module) -> int | None:
    """Return how many experts a token has; the most where layers differ, None where none says it.

    Routers say it, which stand in the block of the experts or beside them, or the config.
    """
    blocks = [model.get_submodule(name.rpartition(".")[0]) for name in find_expert_modules(model)]
    parts = [part for block in blocks for part in block.modules()]
    for places in (parts, [text_config(model)]):
        values = [getattr(place, key, None) for place in places for key in _TOP_K]
        counts = [value for value in values if type(value) is int]
        if counts:
            return max(counts)
    return None
