"""Which dense layers tensor parallelism splits, and how: transformers' own plan for the model.

The plan is taken where it is exact on this number of ranks. Layers depend on each other (what one
gives split, the next takes split), so all layers of a module are split, or none is. Attention for
which transformers has no plan is split where it is of the common form.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

from megablocks_utils.config.parallel import legal_ep_sizes
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.mesh.placement import is_replicated
from megablocks_utils.moe.expert_spec import find_expert_modules

__all__ = ["BY_WIDTH", "GRADIENT_SUM", "Styles", "TensorParallelPlan", "choose_tp_plan"]
__all__ += ["find_other_style"]

Styles = dict[str, str]
"""Name of a module or parameter -> name of transformers' style."""

COLUMNS, ROWS, LOCAL = "colwise", "rowwise", "local_params"
GRADIENT_SUM = "replicated_with_grad_allreduce"
_WHOLE_OUTPUT = ("colwise_gather_output", "colwise_rep")
_WHOLE_INPUT = ("rowwise_split_input", "rowwise_rep")
_BY_COLUMNS, _BY_ROWS = (COLUMNS, *_WHOLE_OUTPUT), (ROWS, *_WHOLE_INPUT)
_BY_TOKEN, BY_WIDTH = "embedding_rowwise", "embedding_colwise"
_BASE_LAYER = "base_layer"
_COUNTED_STYLES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), (COLUMNS,)),
    **dict.fromkeys(("o_proj", "down_proj"), (ROWS,)),
}


@dataclass(frozen=True)
class TensorParallelPlan:
    """What is split, and what transformers' plan names but is not.

    Attributes:
        styles: of modules and of parameters, by their names.
        left_whole: pattern of a module -> why each rank keeps it whole.
    """

    styles: Styles
    left_whole: Mapping[str, str]


def choose_tp_plan(model: PreTrainedModel, tp_size: int) -> TensorParallelPlan:
    """Choose what is split over the ranks of a tp group. No communication.

    Args:
        model: on meta, its adapters attached.
        tp_size: ranks of a group.

    Raises:
        ConfigurationError: heads that do not divide evenly, or nothing that could be split.
    """
    declared = _find_declared(model)
    _add_common_attention(model, declared)
    by_module: dict[str, Styles] = {}
    for name, style in declared.items():
        owner = name if style == LOCAL else name.rpartition(".")[0]
        by_module.setdefault(owner, {})[name] = style
    _check_heads(model, by_module, tp_size)
    styles: Styles = {}
    left_whole: dict[str, str] = {}
    for owner, wanted in by_module.items():
        for group in _independent(wanted):
            reasons = [r for n, s in group.items() if (r := _why_not(model, n, s, tp_size))]
            if reasons:
                left_whole.setdefault(replace_layer_number_by_wildcard(owner), reasons[0])
            else:
                styles |= group
    _check_tied(model, styles, left_whole)
    if not styles:
        reason = next(iter(left_whole.values()), "transformers has no tensor-parallel plan for it")
        raise ConfigurationError(
            f"tp_size is {tp_size}, but it must be 1 for model type {model.config.model_type}: "
            f"{reason}.",
            parameters=("tp_size",),
        )
    return TensorParallelPlan(dict(_expand(model, styles)), left_whole)


def find_other_style(model: PreTrainedModel) -> str:
    """Name a layer that is split otherwise than plans count it; empty where there is none.

    They know attention by heads, gated MLPs by their inner size, the embedding by its width, and
    the head by the vocabulary.
    """
    if model.all_tied_weights_keys:
        return "an output head that is the embedding, under tensor parallelism"
    declared = _find_declared(model)
    _add_common_attention(model, declared)
    experts = tuple(f"{name}." for name in find_expert_modules(model))
    outside = {model.get_input_embeddings(): (_BY_TOKEN, BY_WIDTH)}
    outside[model.get_output_embeddings()] = _WHOLE_OUTPUT
    for name, module in model.named_modules():
        wanted = outside.get(module) or _COUNTED_STYLES.get(name.rpartition(".")[2])
        if not isinstance(module, nn.Linear | nn.Embedding) or f"{name}.".startswith(experts):
            continue
        if declared.get(name) not in (wanted or (None, GRADIENT_SUM, LOCAL)):
            return f"how tensor parallelism splits {name}"
    return ""


def _find_declared(model: PreTrainedModel) -> Styles:
    """Return transformers' plan with the names of this model, without experts."""
    plan = model.tp_plan
    experts = tuple(f"{name}." for name in find_expert_modules(model))
    names = [name for name, _ in model.named_modules()]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found: Styles = {}
    for name in names:
        style = plan.get(replace_layer_number_by_wildcard(name))
        if style is not None and not f"{name}.".startswith(experts):
            found[name] = style
    return found


def _add_common_attention(model: PreTrainedModel, declared: Styles) -> None:
    """Add the styles of attention of the common form that transformers' plan says nothing of."""
    for name, module in model.named_modules():
        if any(known == name or known.startswith(f"{name}.") for known in declared):
            continue
        styles = _common_attention(module)
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
    queries = _linear(parts["q_proj"])
    if not isinstance(queries, nn.Linear):
        return {}
    heads = queries.out_features // head_dim
    for name, parameter in module.named_parameters(recurse=False):
        if tuple(parameter.shape) != (heads,):
            return {}
        styles |= {name: COLUMNS, "": LOCAL}
    return styles


def _independent(styles: Styles) -> Iterable[Styles]:
    """Return the styles that must be applied together; whole inputs and outputs bind nobody."""
    alone = (*_WHOLE_OUTPUT, *_WHOLE_INPUT, _BY_TOKEN, BY_WIDTH)
    bound = {name: style for name, style in styles.items() if style not in alone}
    return [
        *([bound] if bound else []),
        *({name: style} for name, style in styles.items() if style in alone),
    ]


def _check_heads(model: PreTrainedModel, by_module: Mapping[str, Styles], tp_size: int) -> None:
    """Refuse to split an attention whose heads cannot be dealt out evenly."""
    counts: dict[str, int] = {}
    for owner, styles in by_module.items():
        head_dim = getattr(model.get_submodule(owner), "head_dim", None)
        if not isinstance(head_dim, int):
            continue
        for name, style in styles.items():
            target = _get(model, name)
            linear = _linear(target) if isinstance(target, nn.Module) else None
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


def _why_not(model: PreTrainedModel, name: str, style: str, tp_size: int) -> str | None:
    """Return why a part of the plan is not exact here; None if it is."""
    target = _get(model, name)
    parameters = [target] if isinstance(target, nn.Parameter) else list(target.parameters())
    if any(is_replicated(p) for p in parameters) and style not in (GRADIENT_SUM, LOCAL):
        return f"{name} is kept in float32"
    if style in (GRADIENT_SUM, LOCAL):
        return None
    if isinstance(target, nn.Parameter):
        is_even = style == COLUMNS and target.shape[-1] % tp_size == 0
        return None if is_even else f"{name} is not split evenly by {style}"
    layer = _linear(target)
    if style in (_BY_TOKEN, BY_WIDTH):
        return _why_no_embedding(name, layer, tp_size)
    if style not in (*_BY_COLUMNS, *_BY_ROWS):
        return f"{name} is of style {style}"
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return f"{name} is no plain linear layer"
    size = layer.out_features if style in _BY_COLUMNS else layer.in_features
    if size % tp_size:
        return f"the {size} features of {name} are not a multiple of {tp_size}"
    return None


def _why_no_embedding(name: str, layer: nn.Module, tp_size: int) -> str | None:
    is_plain = isinstance(layer, nn.Embedding) and type(layer).forward is nn.Embedding.forward
    if not is_plain or layer.max_norm is not None:
        return f"{name} is no plain embedding"
    if layer.embedding_dim % tp_size:
        return f"the {layer.embedding_dim} columns of {name} are not a multiple of {tp_size}"
    return None


def _check_tied(model: PreTrainedModel, styles: Styles, left_whole: dict[str, str]) -> None:
    """Leave whole a head that shares its weights with the embedding: these are split otherwise."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name.rpartition(".")[0])
    for names in owners.values():
        if len(names) > 1:
            for name in names:
                if styles.pop(name, None):
                    left_whole[name] = f"{names[0]} and {names[-1]} share their weights"


def _expand(model: PreTrainedModel, styles: Styles) -> Iterator[tuple[str, str]]:
    """Yield what transformers applies: the style of each module, and of its parameters.

    An adapter follows its layer: B is split like the columns, A like the rows.
    """
    for name, style in styles.items():
        target = _get(model, name)
        if isinstance(target, nn.Parameter) or style in (GRADIENT_SUM, LOCAL):
            yield name, style
            continue
        style = BY_WIDTH if style == _BY_TOKEN else style
        split = {name: target}
        if isinstance(target, LoraLayer):
            assert isinstance(target, nn.Module)
            factor = {COLUMNS: "lora_B", ROWS: "lora_A"}.get(style)
            split = {f"{name}.{_BASE_LAYER}": _linear(target)}
            if factor is not None:
                factors = target.get_submodule(factor)
                split |= {f"{name}.{factor}.{n}": part for n, part in factors.named_children()}
        for place, module in split.items():
            yield place, style
            yield from ((f"{place}.{p}", style) for p, _ in module.named_parameters())


def _get(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last)


def _linear(module: nn.Module) -> nn.Module:
    """Return the layer that an adapter is around, or the module itself."""
    return module.get_submodule(_BASE_LAYER) if isinstance(module, LoraLayer) else module
