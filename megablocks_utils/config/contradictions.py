"""What options mean together: combinations that contradict each other.

Torch-free.
"""

from collections.abc import Mapping
from typing import Any

from megablocks_utils.config.adapter import (
    EXPERTS,
    LM_HEAD,
    NO_LORA,
    ROUTER,
    parts_of,
    targets_of,
)
from megablocks_utils.config.backends import AUTO, list_backends
from megablocks_utils.config.data_checks import check_data_options
from megablocks_utils.config.dispatch_cost import ROWS
from megablocks_utils.config.evaluation import check_evaluation
from megablocks_utils.config.expert_balance import BALANCED, CONTIGUOUS
from megablocks_utils.config.optim import MUON
from megablocks_utils.config.quantization import check_quantization
from megablocks_utils.errors import ConfigurationError

__all__ = ["check_together"]


def check_together(values: Mapping[str, Any], entry_point: str) -> None:
    """Refuse options that contradict each other.

    Args:
        values: every option by name, defaults where not given.
        entry_point: "fsdp2" or "fsdp1".

    Raises:
        ConfigurationError: naming an option, its value and what it contradicts.
    """
    check_quantization(values, has_lora=targets_of(values) != NO_LORA)
    _check_sharding(values)
    _check_kernel(values)
    check_data_options(values)
    if entry_point == "fsdp1" and values["expert_dp"] == "shard":
        raise ConfigurationError(
            "--expert_dp is shard, but FSDP1 keeps copies of the experts: it must be replicate, or "
            "use train_accelerate_fsdp2.py."
        )
    if entry_point == "fsdp1" and values["cpu_offload"] == "params":
        raise ConfigurationError(
            "--cpu_offload is params, but FSDP1 leaves the experts, most of the weights, on the "
            "devices: it must be none or optimizer, or use train_accelerate_fsdp2.py."
        )
    _check_muon(values, entry_point)
    _check_groups(values, entry_point)
    accumulation = values["gradient_accumulation_steps"]
    if values["compile"] and entry_point == "fsdp1" and accumulation > 1:
        raise ConfigurationError(
            f"--compile is True, but torch compiles no layers of FSDP1 that hold gradients of "
            f"earlier micro-batches: --gradient_accumulation_steps is {accumulation} and must be "
            "1, or use train_accelerate_fsdp2.py."
        )
    _check_adapters(values)
    _check_routers(values)
    check_evaluation(values)
    if values["max_steps"] == 0:
        raise ConfigurationError("--max_steps is 0, but it must be -1 (not set) or at least 1.")
    for name in ("warmup_steps", "save_steps"):
        if values[name] >= 1 and values[name] != int(values[name]):
            raise ConfigurationError(
                f"--{name} is {values[name]}, but it must be a whole number, or below 1 a share."
            )
    if "none" in values["report_to"] and len(set(values["report_to"])) > 1:
        raise ConfigurationError(
            f"--report_to is {', '.join(values['report_to'])}, but none excludes all others."
        )


def _check_sharding(values: Mapping[str, Any]) -> None:
    """Refuse what would do nothing without expert parallelism."""
    idle = {
        "ep_size": (None, 1),
        "expert_tp_size": (1,),
        "expert_dp": (None,),
        "token_dispatch": (AUTO, ROWS),
        "expert_placement": (CONTIGUOUS,),
    }
    for name, harmless in idle.items():
        if not values["use_megablocks_sharding"] and values[name] not in harmless:
            raise ConfigurationError(
                f"--{name} is {values[name]}, but it needs --use_megablocks_sharding True."
            )
    if values["expert_loads"] is not None and values["expert_placement"] == CONTIGUOUS:
        raise ConfigurationError(
            f"--expert_loads is {values['expert_loads']}, but it needs --expert_placement "
            f"{BALANCED}."
        )


def _check_adapters(values: Mapping[str, Any]) -> None:
    """Refuse what needs adapters where there are none, and the other way round."""
    if values["use_dora"]:
        raise ConfigurationError(
            "--use_dora is True, but DoRA divides by norms of whole merged weights in every forward"
            " pass, which lie on several ranks: it must be False (plain LoRA)."
        )
    targets = targets_of(values)
    _check_targets(values)
    if values["resume_adapter"] is not None and targets == NO_LORA:
        raise ConfigurationError(
            "--use_lora is none, but --resume_adapter needs it to say what the adapter is on: "
            "attn-only, mlp-only or all."
        )
    if values["save_dtype"] is not None and targets != NO_LORA:
        raise ConfigurationError(
            f"--save_dtype is {values['save_dtype']}, but with {_give_targets(values)} the "
            "final model is an adapter, in the dtype it is trained in; leave it out, or give it to "
            "megablocks_utils.merge."
        )


def _check_targets(values: Mapping[str, Any]) -> None:
    """Refuse parts that contradict each other, or a dropout that none of them has."""
    use_lora, parts = values["use_lora"], parts_of(targets_of(values))
    if values["lora_target"] and use_lora != NO_LORA and set(parts_of(use_lora)) != set(parts):
        raise ConfigurationError(
            f"--use_lora is {use_lora}, but --lora_target is {','.join(parts)}: leave one of the "
            "two out."
        )
    split = [part for part in (ROUTER, LM_HEAD) if part in parts]
    if split and values["tp_size"] > 1:
        raise ConfigurationError(
            f"--lora_target names {split[0]}, but with --tp_size {values['tp_size']}, which has "
            "the head in parts and routers beside them, it must not; or --tp_size 1."
        )
    dropout = values["lora_dropout"]
    if not dropout:
        return
    without = [part for part in (EXPERTS, ROUTER) if part in parts]
    if not parts or without:
        why = (
            f"{_give_targets(values)} also puts adapters on {' and '.join(without)}, where nothing "
            "can be dropped (all rows or whole weights at once): it must be 0, or --lora_target "
            "without them"
            if parts
            else "there are no adapters: it must be 0, or --use_lora attn-only"
        )
        raise ConfigurationError(f"--lora_dropout is {dropout:g}, but {why}.")
    if values["tp_size"] > 1:
        raise ConfigurationError(
            f"--lora_dropout is {dropout:g}, but with --tp_size {values['tp_size']} it must be 0: "
            "ranks with the same rows would drop different inputs."
        )


def _give_targets(values: Mapping[str, Any], between: str = " ") -> str:
    """Return the option that says which parts have adapters, with its value."""
    if values["lora_target"]:
        return f"--lora_target{between}{','.join(values['lora_target'])}"
    return f"--use_lora{between}{values['use_lora']}"


def _check_muon(values: Mapping[str, Any], entry_point: str) -> None:
    """Refuse Muon where matrices cannot be put together, or states cannot be moved."""
    if values["optim"] != MUON:
        return
    if entry_point == "fsdp1":
        raise ConfigurationError(
            "--optim is muon, but the flat shards of FSDP1 cut matrices anywhere: it must be adamw,"
            " or use train_accelerate_fsdp2.py."
        )
    if values["cpu_offload"] != "none":
        raise ConfigurationError(
            f"--optim is muon, but with --cpu_offload {values['cpu_offload']} it must be adamw: "
            "whole matrices are put together on the devices."
        )


def _check_groups(values: Mapping[str, Any], entry_point: str) -> None:
    """Refuse groups of processes where they cannot be."""
    if values["sp_size"] > 1 and values["compile"]:
        raise ConfigurationError(
            f"--sp_size is {values['sp_size']}, but torch compiles no exchange within a layer: it "
            "must be 1, or --compile False."
        )
    _check_tensor_parallelism(values, entry_point)
    groups = values["dp_replicate_size"]
    if groups == 1:
        return
    if entry_point == "fsdp1":
        raise ConfigurationError(
            f"--dp_replicate_size is {groups}, but train_fsdp1.py shards over all processes: it "
            "must be 1, or use train_accelerate_fsdp2.py."
        )
    if values["cpu_offload"] == "params":
        raise ConfigurationError(
            f"--dp_replicate_size is {groups}, but with --cpu_offload params it must be 1: FSDP "
            "leaves copies of the experts on the devices."
        )


def _check_tensor_parallelism(values: Mapping[str, Any], entry_point: str) -> None:
    """Refuse what tensor parallelism has not been built together with."""
    size = values["tp_size"]
    if size == 1:
        return
    named = f"--tp_size is {size}, but"
    if entry_point == "fsdp1":
        raise ConfigurationError(
            f"{named} FSDP1 shards no tensors that are split already: it must be 1, or use "
            "train_accelerate_fsdp2.py."
        )
    if not values["use_megablocks_sharding"]:
        raise ConfigurationError(
            f"{named} it needs --use_megablocks_sharding True (also --ep_size 1), so that ranks "
            "with the same rows share the work of the experts."
        )
    if values["compile"]:
        raise ConfigurationError(
            f"{named} torch compiles no layer whose weights are split: it must be 1, or --compile "
            "False."
        )


def _check_routers(values: Mapping[str, Any]) -> None:
    """Refuse to change routers in a run that keeps them as they are."""
    targets, rate = targets_of(values), values["router_bias_update_rate"]
    has_lora = targets != NO_LORA
    trains_router = ROUTER in parts_of(targets)
    if (
        has_lora
        and values["freeze_router"] in (True, False)
        and values["freeze_router"] is trains_router
    ):
        why = "puts adapters on routers" if trains_router else "leaves routers as they are"
        raise ConfigurationError(
            f"--freeze_router is {values['freeze_router']}, but {_give_targets(values)} {why}: it "
            f"must be {not trains_router}."
        )
    if rate and (has_lora or values["freeze_router"]):
        cause = _give_targets(values) if has_lora else "--freeze_router True"
        raise ConfigurationError(
            f"--router_bias_update_rate is {rate}, but {cause} leaves their biases as they are: it "
            "must be 0."
        )


def _check_kernel(values: Mapping[str, Any]) -> None:
    """Refuse a kernel that would not be used, or not with adapters on the experts."""
    kernel, named = values["kernel"], f"--kernel is {values['kernel']}"
    if values["use_scattermoe"]:
        if kernel not in ("auto", "scattermoe"):
            raise ConfigurationError(
                f"--use_scattermoe is True, but {named}; leave one of the two out."
            )
        kernel, named = "scattermoe", "--use_scattermoe is True"
    trains_experts = EXPERTS in parts_of(targets_of(values))
    able = [AUTO, *list_backends(with_adapters=True)]
    if trains_experts and kernel not in able:
        raise ConfigurationError(
            f"{_give_targets(values, ' is ')}, but {kernel} runs experts without adapters; "
            f"--kernel {', '.join(able[:-1])} or {able[-1]} runs them with adapters."
        )
    if kernel != "auto" and not values["use_megablocks_sharding"] and not trains_experts:
        raise ConfigurationError(f"{named}, but it needs --use_megablocks_sharding True.")
