"""Build the model of a config that is trained on text, also where it can see or hear.

Where transformers has a text class for a config, that is built; else the class of the whole,
without the parts that text never reaches (towers, projectors). What is stored of these is of no use
in training, and is copied as it is when the model is saved.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping

from megablocks_utils.errors import CheckpointError

__all__ = ["build_text_model", "build_whole_model", "cut_layers"]

_AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)


def build_text_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a config with its parameters on meta and its buffers real.

    Raises:
        CheckpointError: transformers has no model with a language head for it.
    """
    model = _build_first(_AUTO_CLASSES, config)
    if model is None:
        raise CheckpointError(
            f"transformers has no language model for model_type {config.model_type!r}"
        )
    if model.config.get_text_config(decoder=True) is not model.config:
        _remove_other_parts(model)
    classes = {type(module).__name__ for module in model.modules()}
    # Some name classes of towers, or of other models; Accelerate refuses those.
    model._no_split_modules = sorted(set(model._no_split_modules or ()) & classes)
    return model


def build_whole_model(config: PreTrainedConfig) -> PreTrainedModel | None:
    """Build all that a config describes, on meta; None where that is a text model alone."""
    return _build_first(_AUTO_CLASSES[1:], config)


def _build_first(
    auto_classes: Iterable[type[_BaseAutoModelClass]], config: PreTrainedConfig
) -> PreTrainedModel | None:
    for auto_class in auto_classes:
        if type(config) in _mapping_of(auto_class):
            with init_empty_weights(include_buffers=False):
                model: PreTrainedModel = auto_class.from_config(config)
            return model
    return None


def _mapping_of(auto_class: type[_BaseAutoModelClass]) -> _LazyAutoMapping:
    mapping = auto_class._model_mapping
    assert mapping is not None, "only the base class has none"
    return mapping


def _remove_other_parts(model: PreTrainedModel) -> None:
    """Remove what text does not reach, and let its stored tensors be ignored."""
    removed = list(_other_parts(model))
    for name in removed:
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._modules[attribute] = None
    patterns = [rf"^{name.replace('.', chr(92) + '.')}\." for name in removed]
    known = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = {*known, *patterns}
    state = model.state_dict().keys()
    tied = model.all_tied_weights_keys
    model.all_tied_weights_keys = {c: s for c, s in tied.items() if c in state and s in state}


def _other_parts(model: PreTrainedModel) -> Iterator[str]:
    """Yield the modules with parameters beside the text model, from the outermost on."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    path = next(name for name, module in model.named_modules() if module is decoder)
    above = ""
    for step in path.split(".") if path else ():
        owner: nn.Module = model.get_submodule(above)
        for name, child in owner.named_children():
            if name != step and child is not head and next(child.parameters(), None) is not None:
                yield f"{above}.{name}".removeprefix(".")
        above = f"{above}.{step}".removeprefix(".")


def cut_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """Return a config of the first layers alone, with what it lists layer by layer cut too."""
    values = config.to_dict()
    text = config.get_text_config(decoder=True)
    place = next((name for name in config.sub_configs if getattr(config, name) is text), None)
    settings = values if place is None else values[place]
    before = text.num_hidden_layers
    if num_layers >= before:
        return config
    for name, value in settings.items():
        settings[name] = _cut_value(value, before, num_layers)
    settings["num_hidden_layers"] = num_layers
    return type(config).from_dict(values)


def _cut_value(value: Any, before: int, num_layers: int) -> Any:
    if isinstance(value, list) and len(value) == before:
        return value[:num_layers]
    if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
        return {key: item for key, item in value.items() if int(key) < num_layers}
    return value
