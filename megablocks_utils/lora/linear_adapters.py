"""LoRA on linear layers, with PEFT's own layers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from megablocks_utils.lora.linear_choice import has_end
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
        lora_dropout=settings.dropout,
        target_modules=list(settings.linear_ends),
    )
    with torch.random.fork_rng(devices=[]), _weights_off_meta(model):
        torch.manual_seed(seed)
        inject_adapter_in_model(peft_config, without_config)
    for parameter in linear_lora_parameters(model):
        parameter.data = parameter.data.to(dtype)


class RouterLora(ParamWrapper):
    """PEFT's adapter of a router's weight (E, in): the router sees W + scaling * B @ A.

    PEFT's own forward makes a parameter a parametrized one meanwhile, and FSDP1's gathered weight
    is none: it is an attribute. So the changed weight is one, too, which goes before parameters.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the router with the weight that its adapter has changed."""
        router, name = self.get_base_layer(), self.parameter_name
        own = {key: value for key, value in vars(router).items() if key == name}
        vars(router)[name] = self.get_param() + self.get_delta_weight(self.active_adapter[0])
        try:
            return router(x, *args, **kwargs)
        finally:
            del vars(router)[name]
            vars(router).update(own)


def attach_router_lora(
    model: nn.Module, settings: LoraSettings, *, dtype: torch.dtype, seed: int
) -> None:
    """Put adapters around the weights of routers that are no linear layers, in place."""
    peft_config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it, whatever it is
        lora_dropout=0.0,
    )
    names = [n for n, _ in model.named_modules() if has_end(n, settings.router_weights)]
    with torch.random.fork_rng(devices=[]), _weights_off_meta(model):
        torch.manual_seed(seed)
        for name in names:
            parent, _, attribute = name.rpartition(".")
            router = model.get_submodule(name)
            wrapped = RouterLora(
                router,
                "default",
                "weight",
                peft_config,
                r=settings.r,
                lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # likewise
            )
            setattr(model.get_submodule(parent), attribute, wrapped)
    for parameter in linear_lora_parameters(model):
        parameter.data = parameter.data.to(dtype)


@contextmanager
def _weights_off_meta(model: nn.Module) -> Iterator[None]:
    """Give modules on meta weights of one expanded element while the block runs.

    PEFT moves new adapters to the device of the layer's weight, and on meta their values are lost.
    """
    on_meta: dict[nn.Module, nn.Parameter] = {}
    for module in model.modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.is_meta:
            on_meta[module] = weight
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
