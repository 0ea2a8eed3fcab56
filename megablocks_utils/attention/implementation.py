"""Set which attention implementation of transformers a model uses."""

import re

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megablocks_utils.attention.varlen_interface import VARLEN, register_varlen
from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.errors import ConfigurationError

__all__ = [
    "find_dropout",
    "own_implementation",
    "set_implementation",
    "set_named_implementation",
]

_DROPOUT = re.compile(r"(.*_)?att(n|ention)_(dropout|pdrop)(_.*)?")


def own_implementation(model: PreTrainedModel) -> str:
    """Return the implementation that the text model is set to."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """Set the implementation of a whole model, and of the text model in it.

    Raises:
        ValueError: the model cannot use it; what transformers raises for a name passes.
    """
    if own_implementation(model) == name:
        return
    if name == VARLEN:
        register_varlen()
    text = model.config.get_text_config(decoder=True)
    inner = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text]
    model.set_attn_implementation({"": name} | dict.fromkeys(inner, name))
    if own_implementation(model) != name:
        raise ValueError("its attention does not go through transformers' attention interface")


def set_named_implementation(model: PreTrainedModel, name: str) -> None:
    """Set an implementation that a user has named.

    Raises:
        ConfigurationError: transformers does not know it, or this model cannot use it.
    """
    names = [known for known in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in known]
    wanted = ", ".join(dict.fromkeys(("auto", VARLEN, "eager", *sorted(names))))

    def refusal(reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"attn_implementation is {name}, but {reason}; it must be auto or another of {wanted}.",
            parameters=("attn_implementation",),
        )

    if name not in ("eager", *names):
        raise refusal("transformers has none of that name")
    with ForeignCode(refusal):
        set_implementation(model, name)


def find_dropout(config: PreTrainedConfig) -> str:
    """Return which field drops out weights of the attention in training; empty for none."""
    text = config.get_text_config(decoder=True)
    for name, value in text.to_dict().items():
        if _DROPOUT.fullmatch(name) and isinstance(value, float | int) and value:
            return f"{name} is {value:g}"
    return ""
