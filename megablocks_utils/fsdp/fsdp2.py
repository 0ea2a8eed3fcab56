"""FSDP2: experts sharded over the dp axis, everything else over the world, or over groups of it.

Experts that are replicated over dp (or that only one rank holds) are left out of FSDP, and so is
what every rank holds whole (parameters kept in float32: a unit computes in one dtype); the router
and all the rest are Accelerate's to shard.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from megablocks_utils.config import ResolvedPrecision, RunConfig
from megablocks_utils.fsdp.accelerate_state import (
    assert_fsdp_is_on,
    shard_over_mesh,
    turn_fsdp_on,
)
from megablocks_utils.fsdp.cpu_offload import build_offload_policy
from megablocks_utils.fsdp.expert_units import holds_experts, shard_experts_over_dp
from megablocks_utils.fsdp.materialize import FillLocal, materialize
from megablocks_utils.fsdp.prefetch import prefetch_in_order
from megablocks_utils.mesh.dense_mesh import world_mesh
from megablocks_utils.mesh.device_mesh import EP_AXIS, axis_size
from megablocks_utils.mesh.placement import is_replicated
from megablocks_utils.moe.expert_slots import ExpertSlots
from megablocks_utils.moe.sharded_moe import ShardedMoE, find_slots
from megablocks_utils.processes.agreement import raise_on_all_ranks

NamedTensors = Iterator[tuple[str, Tensor | None]]


def build_accelerator(
    config: RunConfig,
    precision: ResolvedPrecision,
    layer_classes: list[str],
    device_type: str,
    mesh: DeviceMesh | None = None,
) -> Accelerator:
    """Build the accelerator of the FSDP2 loop, with FSDP really on.

    Accelerate's own mixed precision stays off: it would upcast expert DTensors in place and break
    the first optimizer step. FSDP's policy does the casts.

    Args:
        config: the run.
        precision: its dtypes.
        layer_classes: class names of the modules that become one FSDP unit each.
        device_type: `cpu` or `cuda`.
        mesh: of the dense parameters; None: FSDP shards them over the world.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=layer_classes,
        mixed_precision_policy=build_mixed_precision_policy(precision),
        cpu_offload=build_offload_policy(config.cpu_offload, device_type),
        cpu_ram_efficient_loading=False,  # it takes every parameter for a full tensor of rank 0
        reshard_after_forward=True,
        activation_checkpointing=False,  # that is --gradient_checkpointing, whatever says it
    )
    accumulation = GradientAccumulationPlugin(
        num_steps=config.optim.gradient_accumulation_steps,
        sync_with_dataloader=False,
        sync_each_batch=bool(config.optim.sync_each_batch),
    )
    accelerator = Accelerator(
        cpu=device_type == "cpu",
        fsdp_plugin=plugin,
        gradient_accumulation_plugin=accumulation,
    )
    turn_fsdp_on(accelerator, plugin)
    assert_fsdp_is_on(accelerator)
    shard_over_mesh(accelerator, mesh)
    return accelerator


def build_mixed_precision_policy(precision: ResolvedPrecision) -> MixedPrecisionPolicy:
    """Gather in the dtype of compute and reduce gradients in the dtype of the trained weights.

    Inputs are not cast: the routing weights must reach the experts in fp32.
    """
    compute = getattr(torch, precision.compute)
    stored = getattr(torch, precision.adapter)
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=stored, cast_forward_inputs=False)


def prepare_fsdp2(
    accelerator: Accelerator,
    model: nn.Module,
    sharded: ShardedMoE | None,
    make_optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer],
    *,
    fill_local: FillLocal,
    on_layer: Callable[[int], None] = lambda _: None,
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Shard the experts over dp, hand the rest to Accelerate, make all reductions sums, and fill.

    **Collective:** every rank of the world must call.

    Args:
        accelerator: from `build_accelerator`.
        model: sharded by `shard_moe`, adapters attached.
        sharded: what `shard_moe` returned; None without expert parallelism.
        make_optimizer: makes the optimizer from the named parameters, the final ones.
        fill_local: where the values of parameters on meta come from.
        on_layer: called with 1 after each layer, for a progress bar.

    Raises:
        UserError: on every rank, what `fill_local` raised on one.
    """
    layers = find_layers(model, accelerator)
    prefetches = prefetches_units(sharded, accelerator.device.type)
    model = wrap_fsdp2(accelerator, model, sharded, prefetches=prefetches)
    raise_on_all_ranks(lambda: fill_layers(accelerator, model, layers, fill_local, on_layer))
    return model, accelerator.prepare_optimizer(make_optimizer(model.named_parameters()))


def wrap_fsdp2(
    accelerator: Accelerator,
    model: nn.Module,
    sharded: ShardedMoE | None,
    *,
    prefetches: bool = False,
) -> nn.Module:
    """Do what `prepare_fsdp2` does up to the filling: what is on meta stays there.

    **Collective:** every rank of the world must call; process groups are made.

    Args:
        accelerator: from `build_accelerator`.
        model: sharded by `shard_moe`, adapters attached.
        sharded: what `shard_moe` returned; None without expert parallelism.
        prefetches: whether the units' forward passes ask for the next one's weights.
    """
    plugin = accelerator.state.fsdp_plugin
    layers = list(find_layers(model, accelerator).values())
    replicated = [p for p in model.parameters() if is_replicated(p)]
    # Accelerate takes modules only, of which it wants nothing but the parameters.
    plugin.ignored_modules = [nn.ParameterList(replicated)]
    if sharded is not None:
        # First, and as units of their own: what is done with the experts would take them along.
        for norm in sharded.post_expert_norms.values():
            fully_shard(
                norm,
                mesh=world_mesh(accelerator.torch_device_mesh),
                mp_policy=plugin.mixed_precision_policy,
                offload_policy=plugin.cpu_offload,
                ignored_params=set(replicated),
            )
        if holds_experts(sharded, plugin.cpu_offload):
            shard_experts_over_dp(sharded, plugin.mixed_precision_policy, plugin.cpu_offload)
        else:
            plugin.ignored_modules.extend(sharded.expert_modules.values())
    model = _prepare_model(accelerator, model)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        # Sums everywhere (see `gradients`). Forced, because gloo has no premultiplied sum, which
        # torch would use even for a factor of 1.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_unshard_in_backward(needs_weights_in_backward(unit))
    if prefetches and sharded is not None:
        prefetch_in_order(sharded, layers)
    return model


def reduce_across_groups(model: nn.Module, *, is_last: bool) -> None:
    """Say whether the next backward pass sums gradients over the groups of HSDP: once a step.

    Until then a rank keeps the sum of its own group, in memory of its own.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)


def prefetches_units(sharded: ShardedMoE | None, device_type: str) -> bool:
    """Return whether units' forward passes ask for the next one's weights.

    They do where the CPU waits for a GPU in every layer. On a CPU a gather is done when it is asked
    for, so that asking early takes memory and gives nothing.
    """
    exchanges = sharded is not None and axis_size(sharded.mesh, EP_AXIS) > 1
    return exchanges and device_type != "cpu"


def needs_weights_in_backward(unit: nn.Module) -> bool:
    """Return whether FSDP must gather a unit's weights for its backward pass.

    The gradient of an embedding does not need its weights, often the largest matrix outside the
    experts. (Tied to the output head, they are in the head's unit.) An embedding with a norm or a
    scale of its own needs these, and would read freed memory: the process dies of it.
    """
    return not isinstance(unit, nn.Embedding) or len(list(unit.parameters())) > 1


def find_layers(model: nn.Module, accelerator: Accelerator) -> dict[str, nn.Module]:
    """Return the decoder layers of a model that is not wrapped yet, by name."""
    classes = accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap
    return {n: m for n, m in model.named_modules() if type(m).__name__ in classes}


def _prepare_model(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Let Accelerate shard a model that has no optimizer yet.

    Accelerate refuses a model without one, and it finds the parameters of a real one again by
    `data_ptr`, which is 0 for all that are on meta. So it gets one without parameters.
    """
    stand_in = torch.optim.SGD([{"params": []}])
    model, prepared = accelerator.prepare(model, stand_in)
    accelerator._optimizers.remove(prepared)
    return model


def fill_layers(
    accelerator: Accelerator,
    model: nn.Module,
    layers: dict[str, nn.Module],
    fill_local: FillLocal,
    on_layer: Callable[[int], None] = lambda _: None,
) -> None:
    """Fill a wrapped model's parameters that are on meta, layer by layer, then the rest.

    No communication, so that it may fail on one rank.
    """
    device, offload = accelerator.device, accelerator.state.fsdp_plugin.cpu_offload
    for name, layer in layers.items():
        materialize(layer, fill_local, device, prefix=f"{name}.", offload=offload)
        on_layer(1)
    materialize(model, fill_local, device, offload=offload)


def full_parameters(model: nn.Module, *, only_trainable: bool = False) -> NamedTensors:
    """Gather one parameter after the other: (name, whole tensor on rank 0, None elsewhere).

    **Collective:** an all-gather a parameter; every rank must iterate to the end.

    Args:
        model: wrapped by `prepare_fsdp2`.
        only_trainable: leave frozen parameters out.
    """
    is_writer, slots = dist.get_rank() == 0, find_slots(model)
    for name, parameter in model.named_parameters():
        if only_trainable and not parameter.requires_grad:
            continue
        whole = gather_whole(parameter)
        yield name, in_model_order(whole.cpu(), slots.get(parameter)) if is_writer else None
        del whole


def in_model_order(whole: Tensor, slots: ExpertSlots | None) -> Tensor:
    """Return a gathered tensor as the model has it, whatever order its experts lie in."""
    return whole if slots is None else slots.to_model_order(whole)


def gather_whole(parameter: nn.Parameter) -> Tensor:
    """Return the whole of a parameter, without its gradient; experts in the order they lie in.

    **Collective:** an all-gather over its mesh; none if it is replicated.
    """
    sharded = parameter.detach()
    if is_replicated(parameter):
        return sharded
    assert isinstance(sharded, DTensor), "FSDP2 and the experts' mesh shard as DTensors"
    # From host memory by way of the device, whose network is the faster one.
    on_device = sharded.to(sharded.device_mesh.device_type)
    assert isinstance(on_device, DTensor)
    return on_device.full_tensor()
