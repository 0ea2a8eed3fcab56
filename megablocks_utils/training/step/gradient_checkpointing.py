"""Recompute activations in the backward pass: all of them, or all but what crosses the network."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel


def apply_gradient_checkpointing(model: PreTrainedModel, mode: str) -> None:
    """Turn on non-reentrant checkpointing of every decoder layer.

    Call it when adapters are attached: before them, PEFT would make the embeddings' output ask for
    a gradient, which only reentrant checkpointing needs.

    Args:
        model: the transformers model (not the PEFT wrapper).
        mode: `full` recomputes everything, the all-to-alls of tokens too; `selective` keeps the
            received rows, the routing and the counts, so that the backward pass repeats no
            exchange and cannot route differently; `none` keeps all activations.
    """
    if mode == "none":
        return
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        kwargs["context_fn"] = _selective_contexts()
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # transformers before 5.20 knows it by its old name only
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def _selective_contexts() -> Callable[[], tuple]:
    return partial(create_selective_checkpoint_contexts, _keep_routing_and_exchange)


def _keep_routing_and_exchange(
    _context: Any, operator: Any, *args: Any, **_kwargs: Any
) -> CheckpointPolicy:
    """Keep received rows and counts, and the experts' copy of the routing.

    The router's own top-k cannot be kept: transformers normalises its values in place.
    """
    is_exchange = operator is torch.ops._c10d_functional.all_to_all_single.default
    is_routing = operator is torch.ops.aten.clone.default and args[0].dtype == torch.int64
    keep = is_exchange or is_routing
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
