"""The shape of any mixture of experts, from what its model is as it was built. Torch-free.

The formulas know attention of queries, keys and values (also through low ranks), gated experts, a
router, shared experts and dense MLPs. A model with anything else is `not_known` to them, by name;
its parameters are counted all the same.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod

from megablocks_utils.planning.model.model_description import ModelDescription
from megablocks_utils.planning.model.model_shape import ModelShape
from megablocks_utils.planning.model.parameter_shapes import (
    DENSE,
    MIXER,
    AttentionShape,
    LayerShape,
    ParameterShape,
)

__all__ = ["shape_of"]

Shapes = Mapping[str, tuple[int, ...]]
_NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}
_ATTENTION = "self_attn."
_MLP = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


class _NotKnownError(Exception):
    """Say what the formulas do not know."""


def shape_of(model: ModelDescription) -> ModelShape:
    """Return the sizes of a model."""
    layers, outside = _split(model)
    reason, attention = model.not_known, None
    if not reason:
        try:
            attention = _find_attention(model, layers)
        except _NotKnownError as error:
            reason = str(error)
    kinds: dict[LayerShape, LayerShape] = {}
    shapes = [_layer_shape(model, layer) for layer in layers]
    return ModelShape(
        model_type=model.model_type,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        num_experts=model.num_experts,
        top_k=model.top_k,
        expert_size=model.expert_size,
        attention=attention,
        is_tied=model.is_tied,
        aux_loss_coef=model.aux_loss_coef,
        layers=tuple(kinds.setdefault(shape, shape) for shape in shapes),
        outside=tuple(outside),
        not_known=reason,
        not_known_under_tp=model.not_known_under_tp,
        layers_path=model.layers,
        routes_in_fp32=model.routes_in_fp32,
    )


def _split(model: ModelDescription) -> tuple[list[dict[str, ParameterShape]], list[ParameterShape]]:
    """Return the parameters of each layer, by their name in it, and all others."""
    layers: dict[int, dict[str, ParameterShape]] = defaultdict(dict)
    outside = []
    adapters = dict.fromkeys(model.mixer_linears, MIXER) | dict.fromkeys(model.dense_linears, DENSE)
    kept, frozen = set(model.kept), set(model.frozen)
    pattern = re.compile(rf"{re.escape(model.layers)}\.(\d+)\.(.+)")
    for name, shape in model.parameters:
        match = pattern.fullmatch(name)
        if match is None:
            room = _room_outside(model, name)
            outside.append(
                ParameterShape(name, shape, room, is_kept=name in kept, is_frozen=name in frozen)
            )
            continue
        is_expert = name.rpartition(".")[0] in model.experts
        room = "experts" if is_expert else _room(match[2])
        adapter = adapters.get(name.removesuffix(".weight"), "")
        layers[int(match[1])][match[2]] = ParameterShape(
            match[2], shape, room, adapter, is_kept=name in kept, is_frozen=name in frozen
        )
    outside.sort(key=lambda parameter: ("embedding", "norm", "head").index(parameter.room))
    return [layers[index] for index in sorted(layers)], outside


def _room_outside(model: ModelDescription, name: str) -> str:
    if name == model.embedding:
        return "embedding"
    return "head" if "head" in name else "norm"


def _room(name: str) -> str:
    if "norm" in name:
        return "norm"
    return "attention" if name.startswith(_ATTENTION) else "mlp"


def _layer_shape(model: ModelDescription, layer: Mapping[str, ParameterShape]) -> LayerShape:
    parameters = tuple(layer.values())
    is_moe = any(parameter.room == "experts" for parameter in parameters)
    down = [p.shape for p in parameters if p.room == "mlp" and p.name.endswith(_MLP[-1])]
    return LayerShape(parameters, is_moe, down[0][-1] if len(down) == 1 else 0)


def _find_attention(
    model: ModelDescription, layers: list[dict[str, ParameterShape]]
) -> AttentionShape:
    """Return the attention of all layers.

    Raises:
        _NotKnownError: there is anything else in them than the formulas know.
    """
    found = set()
    for layer in layers:
        _check_trained(layer)
        found.add(_read_attention(model, layer))
        _check_rest(model, layer)
    if len(found) > 1:
        raise _NotKnownError("layers with different attention")
    return found.pop()


def _check_trained(layer: Mapping[str, ParameterShape]) -> None:
    """Refuse a matrix without a gradient; what is smaller changes no stage."""
    for name, parameter in layer.items():
        if parameter.is_frozen and min(parameter.shape) > 1 < len(parameter.shape):
            raise _NotKnownError(f"{name} without a gradient")


def _read_attention(model: ModelDescription, layer: Mapping[str, ParameterShape]) -> AttentionShape:
    own = {
        name.removeprefix(_ATTENTION): parameter.shape
        for name, parameter in layer.items()
        if name.startswith(_ATTENTION)
    }
    weights = {name.removesuffix(".weight"): shape for name, shape in own.items()}
    biases = {name for name in own if name.endswith(".bias")}
    linears = {name for name in weights if name.endswith(("_proj", "_mqa"))}
    if "kv_a_proj_with_mqa" in linears:
        attention = _read_latent(model, weights)
    elif linears == {"q_proj", "k_proj", "v_proj", "o_proj"}:
        attention = _read_plain(model, weights, has_bias="q_proj.bias" in biases)
    else:
        others = sorted(set(layer) - _NORMS) if not linears else sorted(linears)
        raise _NotKnownError(f"the mixer with {others[0] if others else 'no parameters'}")
    known = {p.name: p.shape for p in attention.parameters(model.hidden_size)}
    for name, shape in own.items():
        if known.get(f"{_ATTENTION}{name}") != shape:
            raise _NotKnownError(f"the attention's {name} {shape}")
    if len(known) != len(own):
        raise _NotKnownError("attention with some biases only")
    if len({p.adapter for p in layer.values() if p.room == "attention" and len(p.shape) > 1}) > 1:
        raise _NotKnownError("attention with adapters on some layers only")
    return attention


def _read_plain(model: ModelDescription, weights: Shapes, *, has_bias: bool) -> AttentionShape:
    head_dim = weights["k_proj"][0] // model.num_kv_heads
    whole = model.num_heads * head_dim
    sizes: dict[tuple[int, ...], str] = {(head_dim,): "head", (whole,): "whole"}
    norm = weights.get("q_norm")
    return AttentionShape(
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        rope_dim=head_dim,
        qk_norm="none" if norm is None else sizes.get(norm, "none"),
        has_bias=has_bias,
        sliding_window=model.sliding_window,
    )


def _read_latent(model: ModelDescription, weights: Shapes) -> AttentionShape:
    none: tuple[int, ...] = (0,)
    kv_rank = weights.get("kv_a_layernorm", none)[0]
    queries = weights.get("q_b_proj") or weights.get("q_proj") or none
    return AttentionShape(
        num_heads=model.num_heads,
        num_kv_heads=model.num_heads,  # keys and values are made for every head
        head_dim=queries[0] // model.num_heads,
        v_head_dim=weights["o_proj"][1] // model.num_heads,
        rope_dim=weights["kv_a_proj_with_mqa"][0] - kv_rank,
        has_bias=False,
        q_rank=weights.get("q_a_layernorm", none)[0],
        kv_rank=kv_rank,
        sliding_window=model.sliding_window,
    )


def _check_rest(model: ModelDescription, layer: Mapping[str, ParameterShape]) -> None:
    """Refuse what is neither attention nor one of the parts that the formulas know."""
    hidden_size = model.hidden_size
    rest = {n: p for n, p in layer.items() if p.room != "experts" and not n.startswith(_ATTENTION)}
    if _NORMS - rest.keys():
        raise _NotKnownError("a layer without the two usual norms")
    if sum(name.endswith(_MLP[0]) for name in rest) > 1:
        raise _NotKnownError("several dense MLPs in a layer")
    is_moe = any(p.room == "experts" for p in layer.values())
    for name, parameter in rest.items():
        is_router = is_moe and prod(parameter.shape) in _router_sizes(model)
        if name not in _NORMS and not name.endswith(_MLP) and not is_router:
            raise _NotKnownError(f"{name} {parameter.shape}")
        if name in _NORMS and parameter.shape != (hidden_size,):
            raise _NotKnownError(f"{name} {parameter.shape}")
        if parameter.is_kept and not is_router:
            raise _NotKnownError(f"{name} in float32")


def _router_sizes(model: ModelDescription) -> Iterator[int]:
    """Yield elements of a router's weight and correction bias, and of a shared expert's gate."""
    yield model.num_experts * model.hidden_size
    yield model.num_experts
    yield model.hidden_size
