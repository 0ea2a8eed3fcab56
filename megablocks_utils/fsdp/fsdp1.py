"""FSDP1: flat shards over the world, without the experts and what every rank holds whole.

FSDP1 averages gradients over the ranks; this project sums them (see `gradients`). The public
communication hook makes the reduction a plain sum, so no loss and no gradient is scaled to undo an
average, and accumulation, mixed precision and padding work as FSDP1 does them.

A layer with adapters is wrapped twice: an inner unit holds its frozen weights, an outer one its
adapters. A flat parameter has one dtype, and frozen weights beside trainable ones would need
gradient memory. Both gather at the layer's door, outside of what checkpointing repeats. (Units
around each small adapter, as PEFT's wrap policy makes them, gather eight times a layer and again in
recomputation, which selective checkpointing does not survive.)
"""

from collections.abc import Callable
from itertools import groupby

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.tensor import DTensor

from megablocks_utils.config import ResolvedPrecision
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.fsdp.fsdp2 import NamedTensors, gather_whole, in_model_order
from megablocks_utils.fsdp.materialize import FillLocal, materialize
from megablocks_utils.mesh.placement import is_replicated
from megablocks_utils.moe.sharded_moe import ShardedMoE, find_slots
from megablocks_utils.processes.agreement import raise_on_all_ranks

# torch 2.13 renamed it and warns at the old name, the only one that 2.11 has.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_SHARDED_STRATEGIES = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_ADAPTER_PARTS = (".lora_A.", ".lora_B.")


def build_fsdp1_plugin(precision: ResolvedPrecision) -> FullyShardedDataParallelPlugin:
    """Build Accelerate's description of FSDP1.

    What is not set here (prefetching, `FULL_SHARD` or `SHARD_GRAD_OP`) comes from
    `accelerate.yaml`.

    Raises:
        ConfigurationError: a sharding strategy that does not shard over the world.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1,
        auto_wrap_policy="no_wrap",  # `wrap_fsdp1` does
        mixed_precision_policy=build_mixed_precision(precision),
        use_orig_params=True,  # the optimizer groups by name
        cpu_offload=False,
        activation_checkpointing=False,  # the model does its own
        # Both would send rank 0's weights to all: every rank holds other experts.
        sync_module_states=False,
        cpu_ram_efficient_loading=False,
    )
    if plugin.sharding_strategy not in _SHARDED_STRATEGIES:
        wanted = " or ".join(strategy.name for strategy in _SHARDED_STRATEGIES)
        raise ConfigurationError(
            f"fsdp_sharding_strategy is {plugin.sharding_strategy.name} in Accelerate's "
            f"configuration, but it must be {wanted}."
        )
    return plugin


def build_mixed_precision(precision: ResolvedPrecision) -> MixedPrecision | None:
    """Gather in the dtype of compute, reduce in that of the trained weights; None if they agree.

    Buffers stay as they are (rotary frequencies need fp32), and inputs are not cast: the routing
    weights must reach the experts in fp32.
    """
    if precision.compute == precision.adapter:
        return None
    return MixedPrecision(
        param_dtype=getattr(torch, precision.compute),
        reduce_dtype=getattr(torch, precision.adapter),
        cast_root_forward_inputs=False,
    )


def wrap_fsdp1(
    model: nn.Module,
    sharded: ShardedMoE | None,
    plugin: FullyShardedDataParallelPlugin,
    *,
    layer_classes: list[str],
    device: torch.device,
    fill_local: FillLocal,
    on_layer: Callable[[int], None] = lambda _: None,
) -> FullyShardedDataParallel:
    """Wrap every decoder layer, then the rest, leave the experts alone, and sum all gradients.

    What is on meta is filled just before it is wrapped, so that a rank holds the dense weights of
    one unit whole at a time, beside its shards and its experts.

    **Collective:** every rank of the world must call.

    Args:
        model: sharded by `shard_moe`, adapters attached; its layers are replaced in place.
        sharded: what `shard_moe` returned; None without expert parallelism.
        plugin: from `build_fsdp1_plugin`.
        layer_classes: class names of the layers.
        device: where this rank computes.
        fill_local: where the values of parameters on meta come from.
        on_layer: called with 1 after each layer, for a progress bar.

    Raises:
        UserError: on every rank, what `fill_local` raised on one.
    """
    root = raise_on_all_ranks(
        lambda: fill_and_wrap_fsdp1(
            model,
            sharded,
            plugin,
            layer_classes=layer_classes,
            device=device,
            fill_local=fill_local,
            on_layer=on_layer,
        )
    )
    root.register_comm_hook(root.process_group, _sum_over_ranks)
    return root


def fill_and_wrap_fsdp1(
    model: nn.Module,
    sharded: ShardedMoE | None,
    plugin: FullyShardedDataParallelPlugin,
    *,
    layer_classes: list[str],
    device: torch.device,
    fill_local: FillLocal,
    on_layer: Callable[[int], None] = lambda _: None,
) -> FullyShardedDataParallel:
    """Do what `wrap_fsdp1` does up to the sums; nothing communicates, so that a rank may fail."""

    def wrap(module: nn.Module) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(
            module,
            sharding_strategy=plugin.sharding_strategy,
            mixed_precision=plugin.mixed_precision_policy,
            backward_prefetch=plugin.backward_prefetch,
            forward_prefetch=plugin.forward_prefetch,
            limit_all_gathers=plugin.limit_all_gathers,
            use_orig_params=True,
            ignored_states=[p for p in module.parameters() if _is_left_alone(p)],
            device_id=device,
        )

    layers = [(n, m) for n, m in model.named_modules() if type(m).__name__ in layer_classes]
    layers += _find_adapted_head(model)
    norms = sharded.post_expert_norms if sharded else {}
    for name, layer in layers:
        materialize(layer, fill_local, device, prefix=f"{name}.")
        for norm_name in [other for other in norms if other.startswith(f"{name}.")]:
            model.set_submodule(norm_name, wrap(norms[norm_name]))
        model.set_submodule(name, _wrap_layer(layer, wrap))
        on_layer(1)
    materialize(model, fill_local, device)
    return wrap(model)


def _wrap_layer(
    layer: nn.Module, wrap: Callable[[nn.Module], FullyShardedDataParallel]
) -> FullyShardedDataParallel:
    """Wrap a layer's frozen weights and its adapters in a unit each; without adapters in one."""
    adapters = _take_adapters_off(layer)
    unit = wrap(layer)
    for place, child, adapter in adapters:
        setattr(place, child, adapter)
    return wrap(unit) if adapters else unit


def full_parameters(model: nn.Module, *, only_trainable: bool = False) -> NamedTensors:
    """Gather layer by layer: (name, whole tensor on rank 0, None elsewhere).

    Names and order are those of the unwrapped model's `named_parameters`. Between two tensors a
    rank holds at most one layer's weights outside the experts, or one projection of one layer's
    experts, more than in training.

    **Collective:** an all-gather for each layer's run of parameters and one for each expert
    parameter; every rank of the world must iterate to the end.

    Args:
        model: wrapped by `wrap_fsdp1`.
        only_trainable: leave frozen parameters out.
    """
    is_writer, slots = dist.get_rank() == 0, find_slots(model)
    units = {id(p): unit for unit in _units(model).values() for p in _own_parameters(unit).values()}
    wanted = [
        (strip_wrappers(name), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not only_trainable
    ]
    for unit, run in groupby(wanted, key=lambda item: units.get(id(item[1]))):
        if unit is None:
            for name, parameter in run:
                whole = gather_whole(parameter)
                ours = in_model_order(whole.cpu(), slots.get(parameter)) if is_writer else None
                yield name, ours
                del whole
            continue
        with FullyShardedDataParallel.summon_full_params(
            unit, recurse=False, writeback=False, rank0_only=True
        ):
            for name, parameter in run:
                # A copy also on CPU: FSDP1 frees the memory of what it has gathered.
                yield name, parameter.detach().to("cpu", copy=True) if is_writer else None


def strip_wrappers(name: str) -> str:
    """Return a parameter's name without the parts that FSDP1 and checkpointing put in."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _sum_over_ranks(
    group: dist.ProcessGroup, gradient: Tensor, shard: Tensor | None = None
) -> None:
    """Reduce an unsharded gradient into this rank's shard, or in place if FSDP1 does not shard.

    FSDP1's own hook signature; one rank alone is what it does not shard.
    """
    if shard is None:
        dist.all_reduce(gradient, group=group)
    else:
        _reduce_scatter(shard, gradient, group=group)


def _units(model: nn.Module) -> dict[str, FullyShardedDataParallel]:
    """Return every FSDP unit by the prefix of its parameters' names, the root first."""
    return {
        f"{name}." if name else "": module
        for name, module in model.named_modules()
        if isinstance(module, FullyShardedDataParallel)
    }


def _own_parameters(unit: FullyShardedDataParallel) -> dict[str, nn.Parameter]:
    """Return the parameters that a unit shards, by name, without those of units inside it."""
    inside = tuple(prefix for prefix in _units(unit.module) if prefix)
    return {
        name: parameter
        for name, parameter in unit.module.named_parameters()
        if not name.startswith(inside)
        and not _is_left_alone(parameter)
        and _is_adapter(name) == _holds_adapters(unit)
    }


def _holds_adapters(unit: FullyShardedDataParallel) -> bool:
    """Return whether this is the outer one of a layer's two units."""
    return isinstance(unit.module, FullyShardedDataParallel)


def _find_adapted_head(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the output head with its name if it has adapters: a layer then, of two units."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or not any(_is_adapter(key) for key, _ in head.named_parameters()):
        return []
    return [(name, module) for name, module in model.named_modules() if module is head]


def _take_adapters_off(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Take the adapters' modules out of a layer; returns where each was, for `setattr`.

    FSDP1 could be told to ignore them, but then every unit around that one ignores them too.
    """
    paths = [name.rpartition(".")[0] for name, _ in layer.named_parameters() if _is_adapter(name)]
    taken = []
    for path in paths:
        parent, _, child = path.rpartition(".")
        place = layer.get_submodule(parent)
        taken.append((place, child, getattr(place, child)))
        delattr(place, child)
    return taken


def _is_left_alone(parameter: nn.Parameter) -> bool:
    """Return whether FSDP1 does not shard it: an expert, which is a DTensor, or replicated."""
    return isinstance(parameter, DTensor) or is_replicated(parameter)


def _is_adapter(name: str) -> bool:
    return any(part in f".{name}" for part in _ADAPTER_PARTS)
