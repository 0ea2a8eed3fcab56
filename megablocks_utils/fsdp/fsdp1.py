"""FSDP1: experts left out of FSDP as sharded copies, everything else in flat shards over the world.

FSDP1 averages gradients over the ranks; this project sums them (see `gradients`). The public
communication hook makes the reduction a plain sum, so no loss and no gradient is scaled to undo an
average, and accumulation, mixed precision and padding work as FSDP1 does them.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.tensor import DTensor

from megablocks_utils.config import ResolvedPrecision
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.shard_moe_utils import ShardedMoE

# torch 2.13 renamed it and warns at the old name, the only one that 2.11 has.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_SHARDED_STRATEGIES = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_PEFT_PREFIX = "base_model.model."
_PEFT_BASE_LAYER = ".base_layer."
_PEFT_ADAPTER_NAME = ".default."
_ADAPTER_PARTS = (".lora_A.", ".lora_B.")


def build_fsdp1_plugin(
    precision: ResolvedPrecision, layer_classes: list[str], sharded: ShardedMoE | None
) -> FullyShardedDataParallelPlugin:
    """Build Accelerate's description of FSDP1: what to wrap, what to leave alone, which dtypes.

    What is not set here (prefetching, `FULL_SHARD` or `SHARD_GRAD_OP`) comes from `accelerate.yaml`.

    Args:
        precision: the run's dtypes.
        layer_classes: class names of the modules that become one FSDP unit each. Adapters get
            units of their own from PEFT's wrap policy, which Trainer puts in place: a flat
            parameter has one dtype, and frozen weights beside them would need gradient memory.
        sharded: whose experts FSDP leaves alone; None without expert parallelism.

    Raises:
        ConfigurationError: a sharding strategy that does not shard over the world.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=layer_classes,
        mixed_precision_policy=build_mixed_precision(precision),
        ignored_modules=list(sharded.expert_modules.values()) if sharded else None,
        use_orig_params=True,  # optimizer groups by name
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

    Buffers stay as they are (rotary frequencies need fp32). Inputs of a unit are cast: PEFT casts an
    adapter's input to the stored dtype of its weights, which is not the gathered one. The routing
    weights still reach the experts in fp32, since experts are no unit.
    """
    if precision.compute == precision.adapter:
        return None
    return MixedPrecision(
        param_dtype=getattr(torch, precision.compute),
        reduce_dtype=getattr(torch, precision.adapter),
    )


def sum_gradients(model: nn.Module) -> None:
    """Make all gradient reductions of a wrapped model sums over the ranks. Once, before training.

    Raises:
        RuntimeError: the model is not wrapped, or a parameter is neither in FSDP nor a DTensor of
            an expert: its gradient would never be reduced.
    """
    if not isinstance(model, FullyShardedDataParallel):
        raise RuntimeError(f"the model is a {type(model).__name__}, which FSDP1 has not wrapped")
    managed = {id(p) for unit in _units(model).values() for p in _own_parameters(unit).values()}
    left_out = [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in managed and not isinstance(parameter, DTensor)
    ]
    if left_out:
        raise RuntimeError(f"FSDP1 left {len(left_out)} parameters out, the first is {left_out[0]}")
    model.register_comm_hook(model.process_group, _sum_over_ranks)


def full_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Gather the weights of the model without its adapters, one FSDP unit (a layer) at a time.

    **Collective:** every rank of the world must iterate to the end. Between two tensors a rank holds
    at most one unit's weights, or one expert projection of one layer, more than in training.

    Yields:
        The name that the transformers model knows the parameter by, and on rank 0 the whole tensor
        on the CPU, on other ranks None. Tied parameters come once.
    """
    for name, tensor in _gather(model, lambda name: not _is_adapter(name)):
        name = name.removeprefix(_PEFT_PREFIX).replace(_PEFT_BASE_LAYER, ".")
        yield name, tensor


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Gather the LoRA weights, under the names they have in PEFT's `adapter_model.safetensors`.

    **Collective:** as `full_parameters`; frozen weights are not gathered.
    """
    for name, tensor in _gather(model, _is_adapter):
        yield name.replace(_PEFT_ADAPTER_NAME, "."), tensor


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


def _gather(
    model: nn.Module, is_wanted: Callable[[str], bool]
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the wanted parameters of each unit, then of the experts within it."""
    is_writer = dist.get_rank() == 0
    for prefix, unit in _units(model).items():
        wanted = {
            name: parameter
            for name, parameter in _own_parameters(unit).items()
            if is_wanted(strip_wrappers(prefix + name))
        }
        experts = {name: p for name, p in wanted.items() if isinstance(p, DTensor)}
        dense = [name for name in wanted if name not in experts]
        if dense:
            with FullyShardedDataParallel.summon_full_params(
                unit, recurse=False, writeback=False, rank0_only=True
            ):
                gathered = _own_parameters(unit)
                for name in dense:
                    whole = _copy_to_cpu(gathered[name]) if is_writer else None
                    yield strip_wrappers(prefix + name), whole
        for name, parameter in experts.items():
            whole = parameter.detach().full_tensor()
            yield strip_wrappers(prefix + name), whole.cpu() if is_writer else None


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    """Copy even on CPU: FSDP1 frees the memory of what it has gathered."""
    return tensor.detach().to("cpu", copy=True)


def _units(model: nn.Module) -> dict[str, FullyShardedDataParallel]:
    """Return every FSDP unit by the prefix of its parameters' names, the root first."""
    return {
        f"{name}." if name else "": module
        for name, module in model.named_modules()
        if isinstance(module, FullyShardedDataParallel)
    }


def _own_parameters(unit: FullyShardedDataParallel) -> dict[str, nn.Parameter]:
    """Return a unit's parameters, ignored ones included, those of units inside it left out."""
    inside = tuple(_units(unit.module))
    named = unit.module.named_parameters()
    return {name: parameter for name, parameter in named if not name.startswith(inside)}


def _is_adapter(name: str) -> bool:
    return any(part in name for part in _ADAPTER_PARTS)
