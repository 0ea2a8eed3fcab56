"""Where each trained parameter's local part lies in the whole parameter, under FSDP2 and FSDP1.

What a checkpoint of any layout is written from and read into.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.tensor import DTensor

from megablocks_utils.checkpoint.tensor_shards import PartPlace, Place, RunPlace
from megablocks_utils.fsdp.fsdp1 import strip_wrappers
from megablocks_utils.mesh.placement import is_replicated, local_blocks
from megablocks_utils.moe.sharded_moe import find_slots

__all__ = ["PlacedParameters", "find_buffers", "find_places", "flat_handles"]

PlacedParameters = dict[str, tuple[nn.Parameter, Place]]


def find_places(model: nn.Module) -> PlacedParameters:
    """Return every trainable parameter and its place, by its name in the unwrapped model.

    A parameter of which this rank holds nothing is left out under FSDP1, and has no
    elements elsewhere. Adapters keep the names they have in this project's model.

    Args:
        model: wrapped by `prepare_fsdp2` or `wrap_fsdp1`.
    """
    runs, slots = _runs_in_flat_parameters(model.modules()), find_slots(model)
    places: PlacedParameters = {}
    place: Place
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, DTensor) or is_replicated(parameter):
            experts = slots[parameter].experts if parameter in slots else None
            place = PartPlace(tuple(parameter.shape), local_blocks(parameter, experts))
        elif id(parameter) in runs:
            place = runs[id(parameter)]
        else:
            continue
        places[strip_wrappers(name)] = parameter, place
    return places


def find_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers, which each rank holds whole, by name in the bare model."""
    return {
        strip_wrappers(f"{path}.{name}".removeprefix(".")): buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def _runs_in_flat_parameters(modules: Iterable[nn.Module]) -> dict[int, RunPlace]:
    """Return the place of each parameter that FSDP1 holds a part of here, by the parameter's id.

    FSDP1 has this in private attributes only; its public state dicts gather every parameter.
    Without sharding (one rank) all of it is here, as they show.
    """
    runs = {}
    for handle in flat_handles(modules):
        flat = handle.flat_param
        assert flat._params is not None, "build_fsdp1_plugin keeps the original parameters"
        described = zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True)
        for parameter, shape, info in described:
            if info.in_shard:
                assert info.intra_param_start_idx is not None, "it has elements here"
                runs[id(parameter)] = RunPlace(tuple(shape), info.intra_param_start_idx)
    return runs


def flat_handles(modules: Iterable[nn.Module]) -> Iterator[FlatParamHandle]:
    """Yield what FSDP1 knows of each flat parameter, which it has in private attributes only."""
    for module in modules:
        handle = getattr(module, "_handle", None)
        if isinstance(module, FullyShardedDataParallel) and handle is not None:
            yield handle
