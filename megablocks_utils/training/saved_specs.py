"""What the final model's tensors are written as, once their values are known."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from megablocks_utils.checkpoint.saved_dtype import choose_saved_dtypes
from megablocks_utils.fsdp.fsdp1 import strip_wrappers
from megablocks_utils.mesh.placement import local_tensor
from megablocks_utils.processes.agreement import gather_from_all_ranks
from megablocks_utils.training.setup import Setup
from megablocks_utils.training.step.finite import largest_values

__all__ = ["choose_saved_specs"]


_Spec = tuple[str, tuple[int, ...], torch.dtype]


def choose_saved_specs(setup: Setup, model: nn.Module, specs: Iterable[_Spec]) -> list[_Spec]:
    """Return name, whole shape and dtype to write of every tensor of the final model.

    The dtype is that of `--save_dtype`; but a trained model is not lost for a value that this
    cannot hold: it is written as it was trained then, with a warning that names the tensor.

    **Collective:** one all-gather with `--save_dtype`; every rank must call.

    Args:
        setup: the run.
        model: wrapped, trained.
        specs: of its tensors as they are in memory.
    """
    wanted = setup.config.saving.save_dtype
    if wanted is not None:
        limit = torch.finfo(getattr(torch, wanted)).max
        found = gather_from_all_ranks(lambda: _find_beyond(model, limit))
        if beyond := min((place for place in found if place is not None), default=None):
            _, name, value = beyond
            setup.console.print(
                f"warning: --save_dtype is {wanted}, which ends at {limit:g}, but {name} holds"
                f" {value:g}: the model is written in the dtype it was trained in",
                markup=False,
                soft_wrap=True,
            )
            wanted = None
    saved_dtype = choose_saved_dtypes(setup.model, wanted)
    return [(name, shape, saved_dtype(name, dtype)) for name, shape, dtype in specs]


def _find_beyond(model: nn.Module, limit: float) -> tuple[int, str, float] | None:
    """Return the first parameter with a finite value beyond a limit here: its number, name, value.

    One that is not finite is left to the checks for that.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    values = largest_values([local_tensor(parameter.detach()) for parameter in parameters])
    for number, value in enumerate(values.tolist()):
        if limit < value < math.inf:
            return number, strip_wrappers(names[number]), value
    return None
