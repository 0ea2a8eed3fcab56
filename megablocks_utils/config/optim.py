"""How a step is made and how many there are. Torch-free."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from megablocks_utils.config.option import Option

__all__ = ["MUON", "OptimConfig"]

MUON = "muon"

_SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
_OPTIMIZERS = {
    "muon": MUON,
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw": "adamw",
}
# Tried with torchao 0.18 on torch 2.13: a bfloat16 DTensor fails in `lerp` (compiled, in a view of
# another dtype); noise comes from the rank's own generator, so copies of experts would drift apart;
# blocks of 256 that lie across two shards cannot be read on another number of ranks.
_REFUSED_OPTIMIZERS = {
    "adamw_8bit": "torchao's 8-bit AdamW fails on sharded bfloat16 weights and cannot be resumed "
    "on every number of processes (--optim_dtype bfloat16 halves float32 states)"
}


@dataclass(frozen=True)
class OptimConfig:
    """Say how a step is made and how many there are; names and meanings are Hugging Face's.

    Attributes:
        optim: The optimizer, "adamw" or "muon".
        learning_rate: Peak of the schedule.
        lr_scheduler_type: Name for `transformers.get_scheduler`.
        warmup_steps: Whole steps, or below 1 the share of all steps.
        weight_decay: Decoupled, not applied to biases and norms.
        max_grad_norm: Global norm to clip to; 0 means no clipping.
        num_train_epochs: Passes over the data where `max_steps` is -1.
        max_steps: Optimizer steps, or -1.
        per_device_train_batch_size: Examples of a micro-batch of one rank.
        gradient_accumulation_steps: Micro-batches of a step.
        sync_each_batch: Whether gradients are reduced after every micro-batch; the parsers fill in
            True without LoRA and False with it, None only in a config built directly.
        packing: "auto", "True" (examples of a micro-batch in one row) or "False" (a padded batch).
        freeze_router: Whether routers stay as they are; the parsers fill in False without LoRA and
            True with it.
        router_bias_update_rate: What correction biases of routers move by in a step; 0 keeps them.
    """

    optim: Annotated[
        str,
        Option(
            "optimizer; muon trains matrices between embedding and head, each expert's its own, "
            "with torch.optim.Muon's update, and leaves all else, routers too, to AdamW",
            choices=tuple(reversed(_OPTIMIZERS)),
            refused=MappingProxyType(_REFUSED_OPTIMIZERS),
            translation=MappingProxyType(_OPTIMIZERS),
        ),
    ] = "adamw"
    learning_rate: Annotated[float, Option("peak learning rate", minimum=0)] = 5e-5
    lr_scheduler_type: Annotated[
        str, Option("schedule of the learning rate", choices=_SCHEDULES)
    ] = "linear"
    warmup_steps: Annotated[
        float,
        Option(
            "optimizer steps over which the learning rate rises from 0; below 1: that share of all "
            "steps",
            minimum=0,
            limit=10**9,
        ),
    ] = 0
    weight_decay: Annotated[
        float, Option("weight decay; biases and norms are left out", minimum=0)
    ] = 0.0
    max_grad_norm: Annotated[
        float,
        Option("global gradient norm above which gradients are scaled down; 0: never", minimum=0),
    ] = 1.0
    num_train_epochs: Annotated[float, Option("passes over the data", above=0, limit=10**6)] = 3.0
    max_steps: Annotated[
        int,
        Option("optimizer steps, instead of --num_train_epochs; -1: not set", minimum=-1),
    ] = -1
    per_device_train_batch_size: Annotated[
        int, Option("examples of a micro-batch of one process", minimum=1, limit=2**20)
    ] = 8
    gradient_accumulation_steps: Annotated[
        int, Option("micro-batches of an optimizer step", minimum=1, limit=2**16)
    ] = 1
    sync_each_batch: Annotated[
        bool | None,
        Option(
            "reduce gradients after every micro-batch of a step: costs communication, but waiting "
            "keeps whole unsharded gradients in memory",
            shown_default="True without LoRA, False with LoRA",
        ),
    ] = None
    packing: Annotated[
        str,
        Option(
            "examples of a micro-batch in one row (True) or a padded batch (False); auto: one row "
            "if a probe shows that the model keeps them apart",
            choices=("auto", "True", "False"),
        ),
    ] = "auto"
    freeze_router: Annotated[
        bool | None,
        Option(
            "leave the routers as they are",
            shown_default="False without LoRA, True with LoRA",
        ),
    ] = None
    router_bias_update_rate: Annotated[
        float,
        Option(
            "what the routers' correction biases move by after a step, towards experts with fewer "
            "tokens; 0: they stay",
            minimum=0,
        ),
    ] = 0.0
