"""In which dtype a model's tensors are written: that of `--save_dtype`, where it was given."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from megablocks_utils.errors import CheckpointError

__all__ = ["cast_in_range", "choose_saved_dtypes"]


def choose_saved_dtypes(
    model: PreTrainedModel, save_dtype: str | None
) -> Callable[[str, torch.dtype], torch.dtype]:
    """Return a function that says what a tensor of a name and dtype is written in.

    Whole numbers stay what they are, and so does what transformers keeps in float32 when it loads
    this model in the dtype asked for (routers' correction biases for one).

    Args:
        model: whose tensors they are.
        save_dtype: as given; None: every tensor keeps its dtype.
    """
    if save_dtype is None:
        return lambda _name, dtype: dtype
    wanted: torch.dtype = getattr(torch, save_dtype)
    kept = list(model._get_dtype_plan(wanted))
    pattern = build_glob_alternation(kept)[0] if kept else None

    def saved_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
        is_kept = pattern is not None and pattern.search(name) is not None
        return dtype if is_kept or not dtype.is_floating_point else wanted

    return saved_dtype


def cast_in_range(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor on the CPU in another dtype, in which its values are still finite.

    Raises:
        CheckpointError: naming the tensor and the value that is beyond the dtype's range.
    """
    cast = tensor.to("cpu", dtype)
    if tensor.numel() == 0 or not dtype.is_floating_point or dtype == tensor.dtype:
        return cast
    if all(value.isfinite() for value in torch.aminmax(cast)):
        return cast
    ends = torch.stack(torch.aminmax(tensor))
    if ends.isfinite().all():
        raise CheckpointError(
            f"save_dtype is {str(dtype).removeprefix('torch.')}, which ends at"
            f" {torch.finfo(dtype).max:g}, but {name} holds {ends.abs().max().item():g}; it must be"
            " bfloat16 or float32",
            parameters=("save_dtype",),
        )
    return cast
