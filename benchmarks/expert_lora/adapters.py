"""Adapters on experts as contenders: ours, and PEFT's own path.

PEFT adapts the concatenated experts of transformers with `target_parameters`: for each forward pass
it makes W + scaling * B @ A of all experts. Both contenders hold the same weights and the same
adapters, with B not zero, and see the same inputs.
"""

import re
from collections.abc import Callable, Mapping

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.harness.contender import Contender
from megablocks_utils.lora.peft_format import linear_key, pack_lora_a, pack_lora_b
from megablocks_utils.mesh.placement import local_tensor

RANK, ALPHA = 16, 32
OURS, PEFT = "ours", "peft"
_B_STD = 0.05
# PEFT's wrapper of the first projection stands inside that of the second.
_WRAPPERS = {"gate_up_proj": ".base_layer", "down_proj": ""}


def build_contender(
    module: nn.Module,
    forward: Callable[[], Tensor],
    inputs: Mapping[str, Tensor],
    upstream: Tensor | None = None,
    optimizer: Optimizer | None = None,
) -> Contender:
    """Return a module with adapters as a contender; adapters are compared in PEFT's form."""
    trained: dict[str, Tensor] = {}
    to_common: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, parameter in adapters_of(module):
        if isinstance(module, PeftModel):
            trained[file_key(name)] = parameter
        else:
            key, _ = in_peft_form(name, parameter)
            trained[key] = parameter
            to_common[key] = _form_of(name)
    return Contender(
        forward,
        {f"gradient of {name}": tensor for name, tensor in inputs.items()},
        trained,
        (*module.parameters(), *module.buffers(), *inputs.values()),
        upstream,
        optimizer,
        to_common,
    )


def adapters_of(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return what is trained, with its names in the module."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def in_peft_form(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Return one of our adapters, or its gradient, by the name and in the form of PEFT's files."""
    local = local_tensor(tensor.detach())
    layer, side = re.split(r"\.lora_(?=[AB])", name.removesuffix(".default.weight"))
    module, _, adapters = layer.rpartition(".")
    projection = adapters.removesuffix("_lora")
    if projection not in _WRAPPERS:
        return linear_key(layer, side), local
    pack = pack_lora_a if side == "A" else pack_lora_b
    return linear_key(f"{module}{_WRAPPERS[projection]}", side), pack(local)


def file_key(name: str) -> str:
    """Return the name that a parameter of a PEFT model has in PEFT's files."""
    return name.replace(".default.", ".")


@torch.no_grad()
def fill_b(module: nn.Module) -> None:
    """Make every B random: with the zeros they start with, A would have no gradient."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapters_of(module):
        if ".lora_B" in name:
            local = local_tensor(parameter.detach())
            local.copy_(_B_STD * torch.randn(local.shape, generator=generator))


def build_lora_config(
    place: str, modules: list[str] | None = None, task_type: str | None = None
) -> LoraConfig:
    """Return PEFT's settings for adapters on experts in modules that end with `place`."""
    return LoraConfig(
        task_type=task_type,
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=modules or [],
        target_parameters=[f"{place}.{name}" for name in _WRAPPERS],
    )


def _form_of(name: str) -> Callable[[Tensor], Tensor]:
    return lambda tensor: in_peft_form(name, tensor)[1]
