"""The shape of a mixture of experts, from the plain entries of its `config.json`.

Every parameter is listed with its shape as transformers builds it, so that counts are exact.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megablocks_utils.planning.model.config_values import ConfigValues
from megablocks_utils.planning.model.parameter_shapes import (
    AttentionShape,
    LayerShape,
    ParameterShape,
    list_mlp,
    list_moe,
    norm,
)

__all__ = ["ModelShape"]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        model_type: family, by transformers' name.
        hidden_size: H.
        vocab_size: V.
        num_experts: E.
        top_k: K.
        expert_size: I, of an expert.
        attention: sizes of the attention; None where the formulas do not know it.
        is_tied: whether the output head is the embedding.
        aux_loss_coef: weight of the load-balancing loss that the config turns on; 0 if it is off.
        layers: every decoder layer; layers of one kind are one object.
        outside: parameters of no layer: embedding, final norm, output head unless tied.
        not_known: what of the model the formulas do not know; empty where they know all.
        not_known_under_tp: likewise of how tensor parallelism splits it.
        layers_path: where the decoder layers are.
        routes_in_fp32: whether the routing weights reach the experts in fp32, whatever is computed
            in.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    num_experts: int
    top_k: int
    expert_size: int
    attention: AttentionShape | None
    is_tied: bool
    aux_loss_coef: float
    layers: tuple[LayerShape, ...]
    outside: tuple[ParameterShape, ...]
    not_known: str = ""
    not_known_under_tp: str = ""
    layers_path: str = "model.layers"
    routes_in_fp32: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Read a `config.json`; what is absent there has transformers' default.

        Raises:
            ConfigurationError: a family that is not known, or a value with which there is no model.
        """
        values = ConfigValues(config)
        hidden_size, vocab_size = values.size("hidden_size"), values.size("vocab_size")
        is_tied = values.flag("tie_word_embeddings")
        return cls(
            model_type=values.model_type,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            num_experts=values.size("num_local_experts"),
            top_k=_read_top_k(values),
            expert_size=_read_expert_size(values),
            attention=_read_attention(values),
            is_tied=is_tied,
            aux_loss_coef=_read_aux_loss_coef(values),
            layers=_read_layers(values),
            outside=_list_outside(vocab_size, hidden_size, is_tied),
            routes_in_fp32=values.known.routes_in_fp32,
        )

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @cached_property
    def num_moe_layers(self) -> int:
        """Decoder layers with experts."""
        return sum(layer.is_moe for layer in self.layers)

    @cached_property
    def num_parameters(self) -> int:
        """Elements of all parameters, a tied one once."""
        outside = sum(parameter.numel for parameter in self.outside)
        return outside + sum(layer.numel for layer in self.layers)

    @cached_property
    def num_expert_parameters(self) -> int:
        """Elements of all routed experts."""
        return sum(p.numel for p in self.all_parameters() if p.room == "experts")

    @property
    def num_active_parameters(self) -> int:
        """Elements that one token passes: of the routed experts, top_k of num_experts."""
        active = self.num_expert_parameters * self.top_k // self.num_experts
        return self.num_parameters - self.num_expert_parameters + active

    def all_parameters(self) -> Iterator[ParameterShape]:
        """Yield every parameter."""
        yield from self.outside
        for layer in self.layers:
            yield from layer.parameters

    def named_parameters(self) -> Iterator[tuple[str, ParameterShape]]:
        """Yield every parameter with its whole name."""
        for parameter in self.outside:
            yield parameter.name, parameter
        for index, layer in enumerate(self.layers):
            for parameter in layer.parameters:
                yield f"{self.layers_path}.{index}.{parameter.name}", parameter


def _read_top_k(values: ConfigValues) -> int:
    top_k, num_experts = values.size("num_experts_per_tok"), values.size("num_local_experts")
    if top_k > num_experts:
        raise values.wrong("num_experts_per_tok", f"at most num_experts, {num_experts}")
    return top_k


def _read_expert_size(values: ConfigValues) -> int:
    own = "moe_intermediate_size"
    return values.size(own if values.reads(own) else "intermediate_size")


def _read_aux_loss_coef(values: ConfigValues) -> float:
    name = "router_aux_loss_coef"
    is_on = values.reads(name) and values.flag("output_router_logits")
    return values.fraction(name) if is_on else 0.0


def _read_attention(values: ConfigValues) -> AttentionShape:
    num_heads = values.size("num_attention_heads")
    has_bias = values.reads("attention_bias") and values.flag("attention_bias")
    if values.reads("kv_lora_rank"):
        rope_dim = values.size("qk_rope_head_dim")
        return AttentionShape(
            num_heads=num_heads,
            num_kv_heads=num_heads,  # keys and values are made for every head
            head_dim=rope_dim + values.size("qk_nope_head_dim"),
            v_head_dim=values.size("v_head_dim"),
            rope_dim=rope_dim,
            has_bias=has_bias,
            q_rank=values.optional_size("q_lora_rank") or 0,
            kv_rank=values.size("kv_lora_rank"),
        )
    num_kv_heads = values.optional_size("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise values.wrong("num_attention_heads", f"a multiple of the {num_kv_heads} key heads")
    head_dim = values.optional_size("head_dim") or values.size("hidden_size") // num_heads
    if head_dim == 0:
        raise values.wrong("num_attention_heads", "at most hidden_size")
    switch = "use_sliding_window"
    has_window = values.flag(switch) if values.reads(switch) else True
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        rope_dim=head_dim,
        qk_norm=values.known.qk_norm,
        has_bias=has_bias,
        sliding_window=values.optional_size("sliding_window") if has_window else None,
    )


def _read_layers(values: ConfigValues) -> tuple[LayerShape, ...]:
    moe = _build_layer(values, is_moe=True)
    dense = _build_layer(values, is_moe=False)
    num_layers = values.size("num_hidden_layers")
    if values.reads("first_k_dense_replace"):
        num_dense = values.size("first_k_dense_replace", at_least=0)
        return tuple(dense if index < num_dense else moe for index in range(num_layers))
    if not values.reads("decoder_sparse_step"):
        return (moe,) * num_layers
    step, dense_layers = values.size("decoder_sparse_step"), set(values.numbers("mlp_only_layers"))
    return tuple(
        dense if index in dense_layers or (index + 1) % step else moe for index in range(num_layers)
    )


def _build_layer(values: ConfigValues, *, is_moe: bool) -> LayerShape:
    hidden_size = values.size("hidden_size")
    parameters = _read_attention(values).parameters(hidden_size)
    mlp_size = 0 if is_moe else values.size("intermediate_size")
    if is_moe:
        expert_size = _read_expert_size(values)
        parameters += list_moe(values.size("num_local_experts"), hidden_size, expert_size)
    else:
        parameters += list_mlp("mlp", hidden_size, mlp_size)
    if is_moe and values.reads("n_shared_experts"):
        mlp_size = expert_size * values.size("n_shared_experts")
        parameters += list_mlp("mlp.shared_experts", hidden_size, mlp_size)
    norms = (norm(n, hidden_size) for n in ("input_layernorm", "post_attention_layernorm"))
    return LayerShape((*parameters, *norms), is_moe, mlp_size)


def _list_outside(vocab_size: int, hidden_size: int, is_tied: bool) -> tuple[ParameterShape, ...]:
    matrix = (vocab_size, hidden_size)
    embedding = ParameterShape("model.embed_tokens.weight", matrix, "embedding")
    final_norm = norm("model.norm", hidden_size)
    if is_tied:
        return (embedding, final_norm)
    return (embedding, final_norm, ParameterShape("lm_head.weight", matrix, "head"))
