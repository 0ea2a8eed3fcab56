"""AdamW or Muon, and the schedule, for parameters on several meshes and in every precision."""

import math
import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from megablocks_utils.config import OptimConfig, ResolvedPrecision
from megablocks_utils.errors import MissingKernelError
from megablocks_utils.fsdp.cpu_offload import HostStates
from megablocks_utils.fsdp.fsdp1 import strip_wrappers
from megablocks_utils.kernels.backends.triton import TRITON
from megablocks_utils.mesh.placement import is_replicated
from megablocks_utils.training.step.muon import MUON_STATE, MuonWithAdamW
from megablocks_utils.training.step.stochastic_rounding import StochasticRoundingAdamW

__all__ = ["build_lr_scheduler", "build_optimizer", "has_weight_decay"]

_BETAS = (0.9, 0.999)
_EPS = 1e-8
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


class HostAdamW(HostStates, torch.optim.AdamW):
    """PyTorch's AdamW with its states in host memory."""


class HostStochasticRoundingAdamW(HostStates, StochasticRoundingAdamW):
    """The same of AdamW with stochastic rounding."""


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    optim_config: OptimConfig,
    precision: ResolvedPrecision,
    *,
    seed: int,
    plain_shard: int = 0,
    cpu_offload: str = "none",
    matrices: Collection[str] = (),
) -> torch.optim.Optimizer:
    """Build AdamW (betas 0.9 and 0.999, eps 1e-8) over the trainable parameters.

    PyTorch's fused AdamW wherever all dtypes agree: it makes no temporary of the parameters' size
    (foreach makes several) and is what Trainer uses. `StochasticRoundingAdamW` where the update is
    to be rounded stochastically or the states' dtype is not the weights'. Every kind of parameter,
    DTensors of one mesh or plain tensors, gets a group of its own, since one fused call cannot mix
    DTensors with plain tensors.

    Args:
        named_parameters: in the same order on every rank; frozen ones are left out.
        optim_config: learning rate and weight decay.
        precision: the states' dtype, and whether updates are rounded stochastically.
        seed: of stochastic rounding; equal on all ranks.
        plain_shard: which shard of the plain parameters this rank holds: 0 where each rank holds
            all of them, the rank under FSDP1, whose shards are plain tensors.
        cpu_offload: `optimizer` keeps the states in host memory.
        matrices: names of what Muon trains, see `find_matrices`; AdamW trains all else.

    Raises:
        ValueError: no parameter is trainable.
        MissingKernelError: stochastic rounding on a GPU, and Triton is not installed.
    """
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    groups = _group_parameters(trainable, optim_config.weight_decay, matrices)
    lr, keeps_on_host = optim_config.learning_rate, cpu_offload == "optimizer"
    state_dtype = getattr(torch, precision.optim)
    # What is kept in float32 beside narrower weights then has float32 states too.
    same_dtype = all(p.dtype == state_dtype for _, p in trainable if not is_replicated(p))
    if same_dtype and not precision.stochastic_rounding and not matrices:
        adamw = HostAdamW if keeps_on_host else torch.optim.AdamW
        return adamw(groups, lr=lr, betas=_BETAS, eps=_EPS, fused=True)
    if any(p.is_cuda for _, p in trainable) and not TRITON.is_installed():
        raise MissingKernelError(
            "On a GPU, the optimizer of this precision is a Triton kernel, and Triton is not "
            f"installed; install it with: {TRITON.install}",
            parameters=("precision",),
        )
    rounding = HostStochasticRoundingAdamW if keeps_on_host else StochasticRoundingAdamW
    return (MuonWithAdamW if matrices else rounding)(
        groups,
        lr=lr,
        betas=_BETAS,
        eps=_EPS,
        state_dtype=state_dtype,
        stochastic_weights=precision.stochastic_rounding,
        seed=seed,
        plain_shard=plain_shard,
    )


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, optim_config: OptimConfig, num_training_steps: int
) -> LambdaLR:
    """Build the schedule over `num_training_steps` optimizer steps.

    `warmup_steps` below 1 is a share of all steps, rounded up, as in Trainer.
    """
    warmup_steps = optim_config.warmup_steps
    if warmup_steps < 1:
        warmup_steps = math.ceil(warmup_steps * num_training_steps)
    return get_scheduler(
        optim_config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=int(warmup_steps),
        num_training_steps=num_training_steps,
    )


def has_weight_decay(name: str) -> bool:
    """Return whether a parameter of this name is decayed: Trainer's rule, not biases and norms."""
    return _NO_DECAY.search(name.lower()) is None


def _group_parameters(
    trainable: list[tuple[str, torch.nn.Parameter]], weight_decay: float, matrices: Collection[str]
) -> list[dict[str, Any]]:
    """Return one group for each mesh (None: plain tensors), decay and optimizer, by first name."""
    groups: dict[tuple[Any, float, bool], dict[str, Any]] = {}
    for name, parameter in trainable:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        decay = weight_decay if has_weight_decay(name) else 0.0
        is_muon = strip_wrappers(name) in matrices
        group = groups.setdefault((mesh, decay, is_muon), {"params": [], "weight_decay": decay})
        if is_muon:
            group |= {"is_muon": True, "moments": (MUON_STATE,)}
        group["params"].append(parameter)
    return list(groups.values())
