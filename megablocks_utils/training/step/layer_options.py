"""Apply to the decoder layers what the options say of them: recomputation and compilation."""

from functools import partial

from rich.console import Console
from transformers import PreTrainedModel

from megablocks_utils.config import RunConfig
from megablocks_utils.config.values import join_words
from megablocks_utils.training.step.compiled_parts import compile_parts
from megablocks_utils.training.step.gradient_checkpointing import apply_gradient_checkpointing
from megablocks_utils.training.step.model_probe import ModelProbe

__all__ = ["apply_layer_options"]


def apply_layer_options(
    model: PreTrainedModel, config: RunConfig, probe: ModelProbe, console: Console
) -> None:
    """Turn on checkpointing and compilation, when adapters are attached and nothing is wrapped.

    Args:
        model: its layers change in place.
        config: the run.
        probe: what was found of the model, such as what of it cannot be compiled.
        console: of rank 0; what a rank finds out later it says itself.
    """
    apply_gradient_checkpointing(model, config.gradient_checkpointing)
    if not config.compile:
        return
    own_console = Console(stderr=True, highlight=False)
    codes = compile_parts(
        model,
        eager=dict(probe.eager_parts),
        report=partial(own_console.print, markup=False, soft_wrap=True),
    )
    names = sorted(code.kind.__name__ for code in codes if not code.reason)
    said = f"{join_words(names, 'and')}, when first called" if names else "nothing"
    console.print(f"compiled: {said}", markup=False, soft_wrap=True)
    for code in codes:
        if code.reason:
            console.print(code.describe(), markup=False, soft_wrap=True)
