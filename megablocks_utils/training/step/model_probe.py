"""What a run must know of its model's forward pass, found out on a small model before it starts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from rich.console import Console
from transformers import PreTrainedModel

from megablocks_utils.attention.implementation import (
    own_implementation,
    set_implementation,
    set_named_implementation,
)
from megablocks_utils.attention.varlen_interface import VARLEN
from megablocks_utils.config import RunConfig, resolve_precision
from megablocks_utils.config.optim import MUON
from megablocks_utils.errors import ConfigurationError, UserError
from megablocks_utils.fsdp.materialize import FillLocal
from megablocks_utils.moe.expert_spec import find_expert_modules
from megablocks_utils.processes.agreement import broadcast_from_rank0, raise_on_all_ranks
from megablocks_utils.training.step.aux_loss import (
    AuxLoss,
    choose_aux_loss,
    resolve_aux_loss_coef,
)
from megablocks_utils.training.step.compile_probe import find_eager_parts
from megablocks_utils.training.step.compiled_parts import check_compiler
from megablocks_utils.training.step.expert_loads import ExpertLoads
from megablocks_utils.training.step.kept_parameters import find_narrowed
from megablocks_utils.training.step.learn_logits_map import find_logits_map
from megablocks_utils.training.step.linear_cross_entropy import LogitsMap
from megablocks_utils.training.step.packing_probe import AUTO, OWN, PackingChoice, choose_packing
from megablocks_utils.training.step.router_balance import RouterBalance, as_buffer
from megablocks_utils.training.step.routers import (
    BlockRouter,
    find_correction_biases,
    freeze_routers,
    recognize_routers,
)
from megablocks_utils.training.step.routing_hooks import RoutingHooks
from megablocks_utils.training.step.small_model import build_small_model
from megablocks_utils.training.step.unused_parameters import find_unused

__all__ = ["ModelProbe", "apply_router_options", "probe_model"]

_CHOSEN_HERE = (AUTO, VARLEN)


@dataclass(frozen=True)
class ModelProbe:
    """What was found.

    Attributes:
        packing: how the examples of a micro-batch are kept apart.
        aux_loss: where the load-balancing loss comes from; the model's own where none is asked for.
        routers: the kinds of routers; none where nothing is asked of them.
        unused: parameters that get no gradient from text, so that they are not trained.
        unused_reason: why these are not known.
        logits_map: what the model does to its output head's logits; None if that is not known.
        logits_reason: why not.
        eager_parts: classes of modules that torch cannot compile, with reasons.
    """

    packing: PackingChoice
    aux_loss: AuxLoss = AuxLoss()
    routers: tuple[BlockRouter, ...] = ()
    unused: tuple[str, ...] = ()
    unused_reason: str = ""
    logits_map: LogitsMap | None = None
    logits_reason: str = ""
    eager_parts: tuple[tuple[str, str], ...] = ()

    @property
    def is_varlen(self) -> bool:
        """Whether attention takes examples one by one, without a mask."""
        return self.packing.attention == VARLEN


def probe_model(
    config: RunConfig, model: PreTrainedModel, device: torch.device, console: Console
) -> ModelProbe:
    """Let rank 0 find out, for all ranks, what the options need, and freeze what is unused.

    The model's attention is set, too. Call it before experts are split and FSDP wraps the model.

    **Collective:** up to three exchanges of small objects over the world.

    Raises:
        ConfigurationError: on every rank, for an option that this model cannot serve.
    """
    if config.compile:
        raise_on_all_ranks(lambda: check_compiler(device))
    given = config.model.attn_implementation
    if given not in _CHOSEN_HERE:
        raise_on_all_ranks(lambda: set_named_implementation(model, given))
    probe = broadcast_from_rank0(lambda: _probe(config, model, device))
    set_implementation(model, probe.packing.attention)
    for name in probe.unused:
        model.get_parameter(name).requires_grad_(False)
    compute_dtype = getattr(torch, resolve_precision(config, device.type).compute)
    for note in _notes(config, model, probe, compute_dtype):
        console.print(note, markup=False, soft_wrap=True)
    return probe


def _notes(
    config: RunConfig, model: PreTrainedModel, probe: ModelProbe, compute_dtype: torch.dtype
) -> Iterator[str]:
    """Yield what a user should know of it, one line each."""
    if config.has_several_examples:
        yield f"micro-batches are {probe.packing.describe()}"
    if probe.logits_reason:
        yield f"the loss takes the logits of all labels at once: {probe.logits_reason}"
    if probe.unused:
        yield (
            f"{probe.unused[0]} ({len(probe.unused)} parameters in all) gets no gradient from "
            "text: frozen, and saved as it is"
        )
    if probe.unused_reason:
        yield (
            "warning: which parameters get no gradient from text is not known: "
            f"{probe.unused_reason}"
        )
    if narrowed := find_narrowed(model, compute_dtype):
        yield (
            f"warning: {narrowed[0]} ({len(narrowed)} parameters in all), which transformers would "
            f"keep in float32, is computed with in {str(compute_dtype).removeprefix('torch.')}, "
            "as everything else; --precision fp32 computes all in float32"
        )


def _probe(config: RunConfig, model: PreTrainedModel, device: torch.device) -> ModelProbe:
    optim = config.optim
    small = cache(partial(build_small_model, model, device))
    coef = resolve_aux_loss_coef(model.config, config.router_aux_loss_coef)
    given = config.model.attn_implementation
    packing = choose_packing(
        small,
        packing=optim.packing,
        batch_size=optim.per_device_train_batch_size,
        device=device,
        has_aux_loss=coef > 0,
        attention=given if given in _CHOSEN_HERE else OWN,
        own_attention=own_implementation(model),
        packing_length=config.data.packing_length,
    )
    if packing.attention == OWN:
        packing = replace(packing, attention=own_implementation(model))
    aux_loss = AuxLoss()
    if coef > 0:
        aux_loss = choose_aux_loss(
            _asked_by("router_aux_loss_coef", 0, small),
            coef,
            has_parts=config.parallel.sp_size > 1,
        )
    routers: list[BlockRouter] = []
    if optim.router_bias_update_rate:
        routers = recognize_routers(_asked_by("router_bias_update_rate", 0, small))
        _refuse_no_bias(routers, optim.router_bias_update_rate, model.config.model_type)
    elif optim.freeze_router and not config.adapter.has_lora:
        routers = recognize_routers(_asked_by("freeze_router", False, small))
    elif optim.optim == MUON and not config.adapter.has_lora:
        routers = recognize_routers(_asked_by("optim", "adamw", small))
    logits_map, logits_reason = find_logits_map(model)
    probe = ModelProbe(
        packing, aux_loss, tuple(routers), logits_map=logits_map, logits_reason=logits_reason
    )
    if not config.adapter.has_lora:
        probe = _with_unused(probe, model, small, has_aux_loss=coef > 0)
    if not config.compile:
        return probe
    eager_parts = find_eager_parts(
        _asked_by("compile", False, small),
        attention=packing.attention,
        has_router_logits=coef > 0,
    )
    return replace(probe, eager_parts=tuple(eager_parts.items()))


def _with_unused(
    probe: ModelProbe,
    model: PreTrainedModel,
    small: Callable[[], PreTrainedModel],
    *,
    has_aux_loss: bool,
) -> ModelProbe:
    try:
        return replace(probe, unused=find_unused(model, small(), has_aux_loss=has_aux_loss))
    except UserError as error:
        return replace(probe, unused_reason=str(error))


def _asked_by(
    parameter: str, wanted: object, small: Callable[[], PreTrainedModel]
) -> PreTrainedModel:
    try:
        return small()
    except UserError as error:
        raise ConfigurationError(
            f"{error} So {parameter} must be {wanted} for it.", parameters=(parameter,)
        ) from error


def _refuse_no_bias(routers: list[BlockRouter], rate: float, model_type: str) -> None:
    if any(router.bias is not None for router in routers):
        return
    reason = next((router.bias_reason for router in routers), "it has no routers")
    raise ConfigurationError(
        f"router_bias_update_rate is {rate}, but it must be 0 for a model of type {model_type}: "
        f"{reason}.",
        parameters=("router_bias_update_rate",),
    )


def apply_router_options(
    config: RunConfig,
    model: PreTrainedModel,
    probe: ModelProbe,
    device: torch.device,
    fill_local: FillLocal,
) -> RoutingHooks:
    """Freeze the routers, or prepare to move their biases; measure loads, as the options say.

    Call it when the experts are split, and before FSDP wraps the model.

    Args:
        config: the run.
        model: whose routers.
        probe: what was found of them.
        device: where this rank computes.
        fill_local: reads the biases that are on meta.

    Returns:
        What counts the tokens of experts in forward passes.
    """
    optim, routers = config.optim, list(probe.routers)
    if optim.freeze_router and not config.adapter.has_lora:
        freeze_routers(model, routers)
    experts, every = find_expert_modules(model), config.expert_load_steps
    loads = ExpertLoads(experts, every, device) if every else None
    if not optim.router_bias_update_rate:
        return RoutingHooks(loads=loads)
    biases = find_correction_biases(model, routers)
    for bias in biases:
        as_buffer(bias, fill_local)
    balance = RouterBalance(biases, experts, optim.router_bias_update_rate, device)
    return RoutingHooks(balance, loads)
