"""LoRA on linear layers, with PEFT's own layers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.lora.settings import LoraSettings, build_peft_config

_ATTENTION_MODULE = "self_attn"


def find_attention_projections(model: PreTrainedModel, use_lora: str) -> tuple[str, ...]:
    """Find the last names of the linear layers in the attention, sorted (q_proj, k_proj, ...).

    Args:
        model: the model.
        use_lora: its value, for the message.

    Raises:
        ConfigurationError: the model has none.
    """
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f".{_ATTENTION_MODULE}." in f".{name}."
    }
    if not names:
        raise ConfigurationError(
            f"use_lora {use_lora} needs linear layers in modules named {_ATTENTION_MODULE}, but "
            f"model type {model.config.model_type} has none.",
            parameters=("use_lora",),
        )
    return tuple(sorted(names))


def attach_linear_lora(
    model: nn.Module, settings: LoraSettings, *, dtype: torch.dtype, seed: int
) -> None:
    """Put PEFT's adapters around the linear layers that the settings name, in place.

    The same seed gives every rank the same adapters, which FSDP relies on.
    """
    without_experts = LoraSettings(settings.r, settings.lora_alpha, settings.target_modules)
    with torch.random.fork_rng(devices=[]), _weights_off_meta(model):
        torch.manual_seed(seed)
        inject_adapter_in_model(build_peft_config(without_experts), model)
    for parameter in linear_lora_parameters(model):
        parameter.data = parameter.data.to(dtype)


@contextmanager
def _weights_off_meta(model: nn.Module) -> Iterator[None]:
    """Give linear layers on meta weights of one expanded element while the block runs.

    PEFT moves new adapters to the device of the layer's weight, and on meta their values are lost.
    """
    on_meta = {
        module: module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight.is_meta
    }
    for module, weight in on_meta.items():
        expanded = torch.zeros(1, dtype=weight.dtype).expand(weight.shape)
        module.weight = nn.Parameter(expanded, requires_grad=weight.requires_grad)
    try:
        yield
    finally:
        for module, weight in on_meta.items():
            module.weight = weight


def linear_lora_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    """Yield the parameters of PEFT's adapters in a model, in order."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            yield parameter
