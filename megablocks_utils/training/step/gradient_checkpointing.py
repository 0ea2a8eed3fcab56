"""Recompute activations in the backward pass: all of them, or all but what crosses the network."""

from functools import partial
from typing import Any

from transformers import PreTrainedModel

from megablocks_utils.mesh.recomputation import recomputation_contexts


def apply_gradient_checkpointing(model: PreTrainedModel, mode: str) -> None:
    """Turn on non-reentrant checkpointing of every decoder layer.

    Call it when adapters are attached: before them, PEFT would make the embeddings' output ask for
    a gradient, which only reentrant checkpointing needs.

    Args:
        model: the transformers model (not the PEFT wrapper).
        mode: `full` and `selective` keep the routing and the counts, so that the backward pass
            cannot route differently and reads nothing back to the host; `full` sends the rows
            again, `selective` keeps those received; `none` keeps all activations.
    """
    if mode == "none":
        return
    kwargs: dict[str, Any] = {
        "use_reentrant": False,
        "context_fn": partial(recomputation_contexts, keeps_rows=mode == "selective"),
    }
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # transformers before 5.20 knows it by its old name only
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
