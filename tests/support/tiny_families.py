"""Tiny random models of every family of transformers that has experts, found in its registry.

Nothing here lists families: one that a new release of transformers brings is in `CAUSAL` or
`COMPOSITE` at once, and is built from the rules of `tiny_fields`.
"""

import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    models,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.support.tiny_fields import NUM_EXPERTS, exceptions, value_of_field

__all__ = ["CAUSAL", "COMPOSITE", "build_tiny", "save_tiny", "tiny_config"]

_COUNT = re.compile(r"num_experts|num_local_experts|n_routed_experts|moe_num_experts")
STD = 0.1


def tiny_config(model_type: str, **more: Any) -> PreTrainedConfig:
    """Return a tiny config of a family: 8 experts, 2 a token, 4 layers, hidden 64, 128 words.

    Args:
        model_type: of `CAUSAL` or `COMPOSITE`, or of any config that the rules can make small.
        more: fields of the family's own config, above rules and exceptions.
    """
    return CONFIG_MAPPING[model_type](**_tiny_values(CONFIG_MAPPING[model_type]) | more)


def build_tiny(model_type: str, *, seed: int = 0, **more: Any) -> PreTrainedModel:
    """Build a tiny fp32 model with random weights, biases and stored buffers, the same every time.

    A composite family's whole model is built, vision and all.
    """
    config = tiny_config(model_type, **more)
    is_text = model_type in CAUSAL and type(config) in AutoModelForCausalLM._model_mapping
    torch.manual_seed(seed)
    build = (AutoModelForCausalLM if is_text else AutoModelForImageTextToText).from_config
    model: PreTrainedModel = build(config)
    _fill(model, torch.Generator().manual_seed(seed))
    return model.eval()


def save_tiny(model_type: str, folder: str | Path, **more: Any) -> PreTrainedModel:
    """Write a tiny model as transformers writes it, in the names of the Hub, and return it.

    There is no tokenizer beside it: data of token ids needs none.
    """
    model = build_tiny(model_type, **more)
    model.save_pretrained(folder)
    return model


def _fill(model: PreTrainedModel, generator: torch.Generator) -> None:
    stored = model.state_dict(keep_vars=True)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.is_floating_point():
                parameter.copy_(_random_values(name, parameter, generator))
        for name, buffer in model.named_buffers():
            if name not in stored:
                continue  # made from the config each time
            if buffer.is_floating_point():
                buffer.add_(torch.randn(buffer.shape, generator=generator) * STD)
            elif buffer.dim() == 2:  # of every word, its experts
                experts = torch.rand((len(buffer), NUM_EXPERTS), generator=generator).argsort(-1)
                buffer.copy_(experts[:, : buffer.shape[1]])


def _random_values(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Return values of a parameter: of a norm around 1, of all else, biases too, around 0."""
    is_norm = like.dim() == 1 and "bias" not in name
    return torch.randn(like.shape, generator=generator) * STD + float(is_norm)


def _tiny_values(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return tiny values of a config class: its own fields, and those of the configs inside it."""
    inner = _inner_configs(config_class)
    values = dict(_by_rules(config_class))
    if "text_config" in inner:  # sizes are in there
        values = {name: value for name, value in values.items() if name.endswith("token_id")}
    if {"kv_lora_rank", "num_key_value_heads"} <= values.keys():
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent: one key a head
    for name, spec in inner.items():
        tiny = _tiny_values(_class_of(spec))
        values[name] = {**spec.init_kwargs, **tiny, "model_type": spec.model_type}
    return values | exceptions(config_class.model_type)


def _by_rules(config_class: type[PreTrainedConfig]) -> list[tuple[str, Any]]:
    named = ((field.name, value_of_field(field.name)) for field in dataclasses.fields(config_class))
    return [(name, value) for name, value in named if value is not None]


def _inner_configs(config_class: type[PreTrainedConfig]) -> dict[str, SubConfigSpec]:
    specs = config_class.sub_configs_defaults
    return {name: spec for name, spec in specs.items() if spec.model_type in CONFIG_MAPPING}


def _class_of(spec: SubConfigSpec) -> type[PreTrainedConfig]:
    """Return the class of an inner config; where any will do, that of its default."""
    is_one = dataclasses.is_dataclass(spec.config_class)
    return spec.config_class if is_one else CONFIG_MAPPING[spec.model_type]


def _has_experts(config_class: type) -> bool:
    is_known = dataclasses.is_dataclass(config_class)
    return is_known and any(_COUNT.fullmatch(f.name) for f in dataclasses.fields(config_class))


def _list_families() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the text models with experts, and the models around a text model with experts."""
    causal = [
        model_type
        for model_type in (
            *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        )
        if _may_have_experts(model_type) and _is_text_with_experts(CONFIG_MAPPING[model_type])
    ]
    composite = [
        model_type
        for model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        if _may_have_experts(model_type) and _is_around_experts(CONFIG_MAPPING[model_type])
    ]
    return tuple(dict.fromkeys(causal)), tuple(composite)


def _is_text_with_experts(config_class: type[PreTrainedConfig]) -> bool:
    inner = config_class.sub_configs
    return "text_config" not in inner and any(map(_has_experts, (config_class, *inner.values())))


def _is_around_experts(config_class: type[PreTrainedConfig]) -> bool:
    text = _inner_configs(config_class).get("text_config")
    return text is not None and _has_experts(_class_of(text))


def _may_have_experts(model_type: str) -> bool:
    """Look into the source, so that only a few of hundreds of modules are imported.

    The number of experts is a field there, or the default of an inner config is such a family.
    """
    source = _read_source(model_type)
    defaults = re.findall(r"""model_type=["'](\w+)["']""", source)
    return any(_COUNT.search(_read_source(name)) for name in (model_type, *defaults))


@cache
def _read_source(model_type: str) -> str:
    module = model_type_to_module_name(model_type)
    path = Path(models.__path__[0], module, f"configuration_{module}.py")
    return path.read_text(encoding="utf-8") if path.exists() else ""


CAUSAL, COMPOSITE = _list_families()
