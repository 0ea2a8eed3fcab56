"""Give a model that was built on meta its memory and its values, each rank its own part only."""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from megablocks_utils.mesh.placement import (
    is_replicated,
    local_blocks,
    local_tensor,
    mark_replicated,
)
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.moe.sharded_moe import find_slots
from megablocks_utils.quantization.packed_experts import PackedExperts

FillLocal = Callable[[str, Tensor, tuple[int, ...]], None]
"""Fills a part of a parameter: (name in the transformers model, the part, where it begins)."""

# PEFT's layers hold the layer they adapt under this name.
_ADAPTED_LAYER = "base_layer."


@torch.no_grad()
def materialize(
    module: nn.Module,
    fill_local: FillLocal,
    device: torch.device,
    *,
    prefix: str = "",
    offload: OffloadPolicy | None = None,
) -> None:
    """Fill every parameter that is on meta; others (adapters) stay as they are.

    A filled parameter is a new one, put in all places of the old: tied weights stay tied. FSDP2
    looks its parameters up again before the first step. No communication.

    Args:
        module: of the transformers model, or all of it.
        fill_local: where the values come from.
        device: where they go.
        prefix: what the names of the module's parameters begin with in the model.
        offload: FSDP2's, which has shards in host memory; None: all are on the device.
    """
    places: dict[nn.Parameter, list[str]] = {}
    slots = find_slots(module)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if local_tensor(parameter.detach()).is_meta:
            places.setdefault(parameter, []).append(name)
    for parameter, names in places.items():
        name = f"{prefix}{names[0]}".replace(_ADAPTED_LAYER, "")
        owner, _, attribute = names[0].rpartition(".")
        experts = module.get_submodule(owner)
        if is_packed(experts, attribute):
            local: Tensor = _pack(experts, name, parameter, fill_local, device)
        else:
            local = _allocate(parameter, device, offload)
            lie = slots[parameter].experts if parameter in slots else None
            for block in local_blocks(parameter, lie):
                fill_local(name, block.of(local), block.offsets)
        filled = nn.Parameter(_place_like(parameter, local), requires_grad=parameter.requires_grad)
        if is_replicated(parameter):
            mark_replicated(filled)
        for name in names:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, filled)


def is_packed(module: nn.Module, attribute: str) -> TypeGuard[DroplessExperts]:
    """Return whether a parameter is of experts that are packed when they are filled."""
    return (
        isinstance(module, DroplessExperts)
        and module.weight_format is not None
        and attribute in module.spec.projections
    )


def _pack(
    experts: DroplessExperts,
    name: str,
    parameter: nn.Parameter,
    fill_local: FillLocal,
    device: torch.device,
) -> PackedExperts:
    """Read one expert after the other, in fp32, and pack it."""
    assert experts.weight_format is not None, experts
    local = local_tensor(parameter.detach())
    packed = PackedExperts.empty(
        experts.weight_format, local, device=device, is_transposed=experts.spec.is_transposed
    )
    (block,) = local_blocks(parameter)  # whole experts
    matrix = torch.empty((1, *local.shape[1:]), dtype=torch.float32)
    for number in range(len(local)):
        fill_local(name, matrix, (block.offsets[0] + number, 0, 0))
        packed.pack_expert(number, matrix[0].to(device))
    return packed


def _allocate(
    parameter: nn.Parameter, device: torch.device, offload: OffloadPolicy | None
) -> Tensor:
    """Return memory for this rank's part of a parameter."""
    part = local_tensor(parameter.detach())
    if isinstance(offload, CPUOffloadPolicy) and isinstance(parameter, DTensor):
        # Pinned at once: FSDP2 would copy what is not.
        return torch.empty_like(part, device="cpu", pin_memory=offload.pin_memory)
    return torch.empty_like(part, device=device)


def _place_like(parameter: nn.Parameter, local: Tensor) -> Tensor:
    """Declare a local tensor to be this rank's part of a parameter's whole tensor."""
    if not isinstance(parameter, DTensor):
        return local
    # Not `from_local`, which moves what lies in host memory to the mesh's devices.
    return DTensor(local, parameter._spec, requires_grad=False)
