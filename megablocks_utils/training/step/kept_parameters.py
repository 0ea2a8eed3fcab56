"""Parameters that transformers keeps in float32 when the rest of a model is narrower."""

import copy

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from megablocks_utils.mesh.placement import is_replicated, mark_replicated
from megablocks_utils.moe.expert_spec import find_expert_parameters

__all__ = ["cast_parameters", "find_narrowed"]


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    """Give a model on meta the dtype of its weights, but what `from_pretrained` keeps in float32.

    FSDP gathers the parameters of a unit in one dtype, so the kept ones, which are small, are
    marked as replicated: every rank holds and updates them whole.

    Args:
        model: on meta, as its class has built it in `dtype`; only the names of dtypes change.
        dtype: of the weights.
        compute_dtype: of forward and backward; in float32 nothing is kept apart.
    """
    experts = {id(parameter) for parameter in find_expert_parameters(model).values()}
    kept = _find_planned(model, compute_dtype) | _find_declared(model, dtype, compute_dtype)
    for name, parameter in model.named_parameters():
        is_kept = name in kept and id(parameter) not in experts
        parameter.data = parameter.data.to(torch.float32 if is_kept else dtype)
        if is_kept:
            mark_replicated(parameter)


def find_narrowed(model: PreTrainedModel, compute_dtype: torch.dtype) -> list[str]:
    """Return the parameters that transformers would keep wider than they are computed with here."""
    kept = _find_planned(model, compute_dtype)
    return [name for name, p in model.named_parameters() if name in kept and not is_replicated(p)]


def _find_declared(
    model: PreTrainedModel, dtype: torch.dtype, compute_dtype: torch.dtype
) -> set[str]:
    """Return what a class makes in float32 by itself where all else is narrower."""
    if compute_dtype == torch.float32:
        return set()
    built = model
    if dtype != compute_dtype:
        with torch.device("meta"):
            built = type(model)._from_config(copy.deepcopy(model.config), dtype=compute_dtype)
    return {name for name, p in built.named_parameters() if p.dtype == torch.float32}


def _find_planned(model: PreTrainedModel, compute_dtype: torch.dtype) -> set[str]:
    plan = model._get_dtype_plan(compute_dtype)
    if not plan:
        return set()
    pattern, _, _ = build_glob_alternation(list(plan))
    return {name for name, _ in model.named_parameters() if pattern.search(name)}
