"""What options mean on a machine: dtypes by its device, groups by the number of processes."""

from megablocks_utils.config.parallel import check_ep_size, count_ranks_of_slice, count_shard_ranks
from megablocks_utils.config.precision import ResolvedPrecision, resolve_preset
from megablocks_utils.config.run_config import RunConfig
from megablocks_utils.errors import ConfigurationError

__all__ = ["check_world", "resolve_precision"]


def resolve_precision(config: RunConfig, device_type: str) -> ResolvedPrecision:
    """Return the dtypes of this run on `device_type` ("cpu" or "cuda").

    `--precision` decides; else `--dtype`; else the device and the method: fp32 on CPU, on GPU mixed
    with LoRA and bf16_sr without. `--optim_dtype` replaces the preset's dtype of Adam's states.
    """
    return resolve_preset(
        config.precision, has_lora=config.adapter.has_lora, device_type=device_type
    )


def check_world(config: RunConfig, world_size: int, num_experts: int | None = None) -> None:
    """Refuse sizes of groups or a way of offloading that do not fit the number of processes.

    Args:
        config: The run.
        world_size: Processes of the run.
        num_experts: Experts of a layer of the model; None while it is not known yet.

    Raises:
        ConfigurationError: with the numbers, and the ep sizes that would work.
    """
    num_groups = config.parallel.dp_replicate_size
    config.count_data_ranks(world_size)
    world_size = count_shard_ranks(world_size, num_groups)
    if not config.parallel.use_megablocks_sharding:
        return
    expert_tp_size = config.parallel.expert_tp_size
    world_size = count_ranks_of_slice(world_size, expert_tp_size, num_groups)
    given = config.parallel.ep_size
    check_ep_size(
        world_size if given is None else given,
        world_size=world_size,
        num_experts=num_experts,
        num_groups=num_groups,
        expert_tp_size=expert_tp_size,
        note=" (the number of processes)" if given is None and expert_tp_size == 1 else "",
    )
    has_copies = config.parallel.expert_dp == "replicate" and given not in (None, world_size)
    if config.cpu_offload == "params" and has_copies:
        raise ConfigurationError(
            f"cpu_offload is params, but with expert_dp replicate and ep_size {given} on "
            f"{world_size} processes FSDP leaves copies of the experts on the devices: expert_dp "
            "must be shard.",
            parameters=("cpu_offload", "expert_dp", "ep_size"),
        )
