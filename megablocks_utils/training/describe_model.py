"""Describe a built model for the planner, which knows neither torch nor transformers."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.fsdp.tp_plan import find_other_style
from megablocks_utils.kernels.gate import SWIGLU
from megablocks_utils.lora.linear_choice import find_dense_linears, find_mixer_linears
from megablocks_utils.lora.peft_targets import find_loadable
from megablocks_utils.mesh.placement import is_replicated
from megablocks_utils.moe.expert_spec import (
    ExpertSpec,
    find_expert_modules,
    read_expert_spec,
)
from megablocks_utils.moe.model_facts import find_top_k, text_config
from megablocks_utils.planning.model.model_description import ModelDescription

__all__ = ["describe_model", "find_layers", "layers_path"]


def describe_model(model: PreTrainedModel) -> ModelDescription:
    """Say what a plan asks of a model: on meta or not, before anything of it is wrapped.

    What training on text does not reach must be frozen, and nothing else.
    """
    config = text_config(model)
    specs = {name: read_expert_spec(module) for name, module in find_expert_modules(model).items()}
    first = next(iter(specs.values()))
    embedding = model.get_input_embeddings().get_parameter("weight")
    names = {parameter: name for name, parameter in reversed([*model.named_parameters()])}
    num_heads = _size(config, "num_attention_heads")
    mixers, dense = find_mixer_linears(model), find_dense_linears(model)
    return ModelDescription(
        model_type=config.model_type,
        parameters=tuple((name, tuple(p.shape)) for name, p in model.named_parameters()),
        layers=layers_path(model),
        experts=tuple(specs),
        embedding=names[embedding],
        num_experts=math.gcd(*(spec.num_experts for spec in specs.values())),
        top_k=find_top_k(model) or 1,
        expert_size=first.intermediate_size,
        hidden_size=embedding.shape[1],
        vocab_size=embedding.shape[0],
        is_tied=bool(model.all_tied_weights_keys),
        aux_loss_coef=_aux_loss_coef(config),
        num_heads=num_heads,
        num_kv_heads=_size(config, "num_key_value_heads") or num_heads,
        sliding_window=_sliding_window(config),
        not_known="; ".join(_list_unknown(model, config, list(specs.values()))),
        not_known_under_tp=find_other_style(model),
        mixer_linears=tuple(find_loadable(model, mixers)),
        dense_linears=tuple(find_loadable(model, dense)),
        kept=tuple(name for name, p in model.named_parameters() if is_replicated(p)),
        frozen=tuple(name for name, p in model.named_parameters() if not p.requires_grad),
        routes_in_fp32=_routes_in_fp32(model, next(iter(specs))),
    )


def layers_path(model: nn.Module) -> str:
    """Return where the decoder layers are: the first list of modules on the way to the experts."""
    parts = next(iter(find_expert_modules(model))).split(".")
    paths = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next(path for path in paths if isinstance(model.get_submodule(path), nn.ModuleList))


def find_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of the text model."""
    layers = model.get_submodule(layers_path(model))
    assert isinstance(layers, nn.ModuleList)
    return layers


def _routes_in_fp32(model: PreTrainedModel, experts: str) -> bool:
    """Return whether routing weights reach experts in fp32 where all else is bf16.

    The block around them is called on meta, up to them; True where it wants more than tokens.
    """
    block = model.get_submodule(experts.rpartition(".")[0])
    dtypes: list[torch.dtype] = []

    def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
        dtypes.extend(arg.dtype for arg in args[1:] if arg.is_floating_point())
        raise ConfigurationError("seen")

    def on_meta(tensor: Tensor) -> Tensor:
        dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, device="meta", dtype=dtype)

    named = (*block.named_parameters(), *block.named_buffers())
    tokens = torch.empty(1, 2, text_config(model).hidden_size, device="meta", dtype=torch.bfloat16)
    handle = model.get_submodule(experts).register_forward_pre_hook(look)
    try:
        with ForeignCode(ConfigurationError), torch.no_grad():
            functional_call(block, {name: on_meta(tensor) for name, tensor in named}, (tokens,))
    except ConfigurationError:
        pass  # what was seen, or what the block wanted
    finally:
        handle.remove()
    return dtypes != [torch.bfloat16]


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def _aux_loss_coef(config: Any) -> float:
    is_on = getattr(config, "output_router_logits", False)
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0) if is_on else 0.0


def _sliding_window(config: Any) -> int | None:
    """Return the window of all layers; where kinds of layers differ, `_list_unknown` says so."""
    kinds = getattr(config, "layer_types", None)
    has_window = getattr(config, "use_sliding_window", True) and (
        not kinds or "sliding_attention" in kinds
    )
    window = getattr(config, "sliding_window", None)
    return window if has_window and isinstance(window, int) else None


def _list_unknown(model: PreTrainedModel, config: Any, specs: list[ExpertSpec]) -> Iterator[str]:
    """Yield what the formulas have no stage for."""
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        yield "layers of several kinds"
    if not model._supports_sdpa:
        yield "attention that is not torch's own"
    if len({(s.num_experts, s.intermediate_size, s.hidden_size) for s in specs}) > 1:
        yield "experts of several sizes"
    if any(not _is_plain(spec) for spec in specs):
        yield "experts other than gated SiLU without biases"


def _is_plain(spec: ExpertSpec) -> bool:
    is_special = spec.has_bias or spec.has_post_norm or spec.num_zero_experts
    return spec.gate == SWIGLU and not (is_special or spec.is_transposed or spec.is_weighted_before)
