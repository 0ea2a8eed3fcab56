"""Layers of common forms that transformers' plan says nothing of, and how heads divide."""

import math
import re
from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from megablocks_utils.config.parallel import legal_ep_sizes
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.fsdp.tp_styles import (
    COLUMNS,
    GRADIENT_SUM,
    LOCAL,
    ROWS,
    Styles,
    find_linear,
    find_target,
)
from megablocks_utils.moe.expert_spec import find_expert_modules

__all__ = ["add_common_layers", "add_norms_of_heads", "check_heads"]


def add_common_layers(model: PreTrainedModel, declared: Styles) -> None:
    """Add the styles of attention and MLPs of the common form that the plan says nothing of."""
    experts = tuple(f"{name}." for name in find_expert_modules(model))
    for name, module in model.named_modules():
        is_known = any(known == name or known.startswith(f"{name}.") for known in declared)
        if is_known or f"{name}.".startswith(experts):
            continue
        styles = _common_attention(module) or _common_mlp(module)
        declared.update({f"{name}.{part}" if part else name: s for part, s in styles.items()})


def _common_attention(module: nn.Module) -> Styles:
    """Return the styles of an attention's parts: four projections, norms of a head, sinks.

    Empty for all else. A part named "" is the module itself.
    """
    parts, head_dim = dict(module.named_children()), getattr(module, "head_dim", None)
    projections = {"q_proj": COLUMNS, "k_proj": COLUMNS, "v_proj": COLUMNS, "o_proj": ROWS}
    if not isinstance(head_dim, int) or not projections.keys() <= parts.keys():
        return {}
    styles = dict(projections)
    for name, part in parts.items():
        weights = [tuple(p.shape) for p in part.parameters()]
        if name not in projections and weights:
            if weights != [(head_dim,)]:
                return {}
            styles[name] = GRADIENT_SUM
    queries = find_linear(parts["q_proj"])
    if not isinstance(queries, nn.Linear):
        return {}
    heads = queries.out_features // head_dim
    for name, parameter in module.named_parameters(recurse=False):
        if tuple(parameter.shape) != (heads,):
            return {}
        styles |= {name: COLUMNS, "": LOCAL}
    return styles


def _common_mlp(module: nn.Module) -> Styles:
    """Return the styles of a gated MLP's three projections; empty for all else."""
    styles = {"gate_proj": COLUMNS, "up_proj": COLUMNS, "down_proj": ROWS}
    trained = {
        name for name, part in module.named_children() if any(True for _ in part.parameters())
    }
    if trained != styles.keys() or any(True for _ in module.parameters(recurse=False)):
        return {}
    gate, up, down = (find_linear(module.get_submodule(name)) for name in styles)
    linear = [part for part in (gate, up, down) if isinstance(part, nn.Linear)]
    if len(linear) < 3:
        return {}
    shapes = [(part.in_features, part.out_features) for part in linear]
    return styles if shapes == [shapes[0], shapes[0], shapes[0][::-1]] else {}


def add_norms_of_heads(model: PreTrainedModel, declared: Styles) -> None:
    """Add the norms of heads beside projections that are split, where transformers' plan has none.

    It forgets some (Qwen3-VL-MoE, GLM-4.5): each rank has the gradient of its own heads alone.
    """
    for name in [name for name, style in declared.items() if style == COLUMNS]:
        owner, _, projection = name.rpartition(".")
        attention = model.get_submodule(owner)
        shape = (getattr(attention, "head_dim", None),)
        for part, norm in attention.named_children():
            weights = [tuple(parameter.shape) for parameter in norm.parameters()]
            is_of_head = set(weights) == {shape} and _stem(part) == _stem(projection)
            if is_of_head and f"{owner}.{part}" not in declared:
                declared[f"{owner}.{part}"] = GRADIENT_SUM


def _stem(name: str) -> str:
    """Return what a norm and the projection before it have in common: q of q_proj and q_norm."""
    return re.sub(r"_?(proj|norm|layernorm)$", "", name)


def check_heads(model: PreTrainedModel, by_module: Mapping[str, Styles], tp_size: int) -> None:
    """Refuse to split an attention whose heads cannot be dealt out evenly."""
    counts: dict[str, int] = {}
    for owner, styles in by_module.items():
        head_dim = getattr(model.get_submodule(owner), "head_dim", None)
        if not isinstance(head_dim, int):
            continue
        for name, style in styles.items():
            target = find_target(model, name)
            linear = find_linear(target) if isinstance(target, nn.Module) else None
            if style != COLUMNS or not isinstance(linear, nn.Linear):
                continue
            if linear.out_features % head_dim == 0:
                counts[name.rpartition(".")[2]] = linear.out_features // head_dim
    common = math.gcd(*counts.values())
    if counts and common % tp_size:
        found = join_words([f"{count} in {name}" for name, count in counts.items()], "and")
        raise ConfigurationError(
            f"tp_size is {tp_size}, but it must divide the heads of the attention ({found}); "
            f"{join_words(legal_ep_sizes(common), 'and')} would work.",
            parameters=("tp_size",),
        )
