"""Give a model that was built on meta its memory and its values, each rank its own part only."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from megablocks_utils.fsdp.packed_shards import is_packed, pack_experts
from megablocks_utils.mesh.placement import (
    is_replicated,
    local_blocks,
    local_tensor,
    mark_replicated,
)
from megablocks_utils.moe.sharded_moe import find_slots

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
            host = offload if isinstance(offload, CPUOffloadPolicy) else None
            local: Tensor = pack_experts(
                parameter, experts, name, fill_local, device=device, offload=host
            )
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
