"""Which dense layers tensor parallelism splits, and how: transformers' own plan for the model.

The plan is taken where it is exact on this number of ranks. Layers depend on each other (what one
gives split, the next takes split), so all layers of a module are split, or none is. Attention and
gated MLPs for which transformers has no plan are split where they are of the common form.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.fsdp.tp_common_layers import (
    add_common_layers,
    add_norms_of_heads,
    check_heads,
)
from megablocks_utils.fsdp.tp_styles import (
    BASE_LAYER,
    BY_COLUMNS,
    BY_ROWS,
    BY_TOKEN,
    BY_WIDTH,
    COLUMNS,
    GRADIENT_SUM,
    LOCAL,
    ROWS,
    WHOLE_INPUT,
    WHOLE_OUTPUT,
    Styles,
    find_linear,
    find_target,
)
from megablocks_utils.mesh.placement import is_replicated
from megablocks_utils.moe.expert_spec import find_expert_modules

__all__ = ["TensorParallelPlan", "choose_tp_plan", "find_other_style"]

_COUNTED_STYLES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), (COLUMNS,)),
    **dict.fromkeys(("o_proj", "down_proj"), (ROWS,)),
}


@dataclass(frozen=True)
class TensorParallelPlan:
    """What is split, and what is not.

    Attributes:
        styles: of modules and of parameters, by their names.
        left_whole: pattern of a module -> why each rank keeps it whole; also of those that the
            plan does not name, where they have two linear layers or more.
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
    add_common_layers(model, declared)
    add_norms_of_heads(model, declared)
    by_module: dict[str, Styles] = {}
    for name, style in declared.items():
        owner = name if style == LOCAL else name.rpartition(".")[0]
        by_module.setdefault(owner, {})[name] = style
    check_heads(model, by_module, tp_size)
    styles: Styles = {}
    left_whole: dict[str, str] = {}
    for owner, wanted in by_module.items():
        for group in _independent(wanted):
            reasons = [r for n, s in group.items() if (r := _why_not(model, n, s, tp_size))]
            reasons += _why_alone(group)
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
    for name in _find_without_style(model, styles):
        pattern = replace_layer_number_by_wildcard(name)
        left_whole.setdefault(pattern, "transformers' plan does not name it")
    return TensorParallelPlan(dict(_expand(model, styles)), left_whole)


def find_other_style(model: PreTrainedModel) -> str:
    """Name a layer that is split otherwise than plans count it; empty where there is none.

    They know attention by heads, gated MLPs by their inner size, the embedding by its width, and
    the head by the vocabulary.
    """
    if model.all_tied_weights_keys:
        return "an output head that is the embedding, under tensor parallelism"
    declared = _find_declared(model)
    add_common_layers(model, declared)
    experts = tuple(f"{name}." for name in find_expert_modules(model))
    outside = {model.get_input_embeddings(): (BY_TOKEN, BY_WIDTH)}
    outside[model.get_output_embeddings()] = WHOLE_OUTPUT
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


def _find_without_style(model: PreTrainedModel, styles: Styles) -> Iterator[str]:
    """Yield modules with several linear layers of which none is split."""
    experts = tuple(f"{name}." for name in find_expert_modules(model))
    for name, module in model.named_modules():
        parts = dict(module.named_children())
        linear = [part for part in parts if isinstance(find_linear(parts[part]), nn.Linear)]
        is_split = any(f"{name}.{part}" in styles for part in linear)
        if len(linear) > 1 and not is_split and not f"{name}.".startswith(experts):
            yield name


def _independent(styles: Styles) -> Iterable[Styles]:
    """Return the styles that must be applied together; whole inputs and outputs bind nobody."""
    alone = (*WHOLE_OUTPUT, *WHOLE_INPUT, BY_TOKEN, BY_WIDTH)
    bound = {name: style for name, style in styles.items() if style not in alone}
    return [
        *([bound] if bound else []),
        *({name: style} for name, style in styles.items() if style in alone),
    ]


def _why_not(model: PreTrainedModel, name: str, style: str, tp_size: int) -> str | None:
    """Return why a part of the plan is not exact here; None if it is."""
    target = find_target(model, name)
    parameters = [target] if isinstance(target, nn.Parameter) else list(target.parameters())
    if any(is_replicated(p) for p in parameters) and style not in (GRADIENT_SUM, LOCAL):
        return f"{name} is kept in float32"
    if style in (GRADIENT_SUM, LOCAL):
        return None
    if isinstance(target, nn.Parameter):
        is_even = style == COLUMNS and target.shape[-1] % tp_size == 0
        return None if is_even else f"{name} is not split evenly by {style}"
    layer = find_linear(target)
    if style in (BY_TOKEN, BY_WIDTH):
        return _why_no_embedding(name, layer, tp_size)
    if style not in (*BY_COLUMNS, *BY_ROWS):
        return f"{name} is of style {style}"
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return f"{name} is no plain linear layer"
    size = layer.out_features if style in BY_COLUMNS else layer.in_features
    if size % tp_size:
        return f"the {size} features of {name} are not a multiple of {tp_size}"
    return None


def _why_alone(group: Styles) -> list[str]:
    """Return why layers of one module are not split: what one gives split, no other takes so."""
    counterpart = {COLUMNS: ROWS, ROWS: COLUMNS}
    return [
        f"{name} is {style}, and no layer beside it {wanted}"
        for name, style in group.items()
        if (wanted := counterpart.get(style)) and wanted not in group.values()
    ]


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
        target = find_target(model, name)
        if isinstance(target, nn.Parameter) or style in (GRADIENT_SUM, LOCAL):
            yield name, style
            continue
        style = BY_WIDTH if style == BY_TOKEN else style
        split = {name: target}
        if isinstance(target, LoraLayer):
            assert isinstance(target, nn.Module)
            factor = {COLUMNS: "lora_B", ROWS: "lora_A"}.get(style)
            split = {f"{name}.{BASE_LAYER}": find_linear(target)}
            if factor is not None:
                factors = target.get_submodule(factor)
                split |= {f"{name}.{factor}.{n}": part for n, part in factors.named_children()}
        for place, module in split.items():
            yield place, style
            yield from ((f"{place}.{p}", style) for p, _ in module.named_parameters())
