"""LoRA on linear layers, with PEFT's own layers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from megablocks_utils.lora.settings import LoraSettings


def attach_linear_lora(
    model: nn.Module, settings: LoraSettings, *, dtype: torch.dtype, seed: int
) -> None:
    """Put PEFT's adapters around the linear layers that the settings name, in place.

    The same seed gives every rank the same adapters, which FSDP relies on.
    """
    # By a config, PEFT would take some of the names for those of single experts.
    without_config = nn.Module()
    without_config.add_module("model", model)
    peft_config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it, whatever it is
        lora_dropout=0.0,
        target_modules=list(settings.linear_ends),
    )
    with torch.random.fork_rng(devices=[]), _weights_off_meta(model):
        torch.manual_seed(seed)
        inject_adapter_in_model(peft_config, without_config)
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
