"""Ask PEFT which modules of a model an adapter's configuration targets, and with what strength.

PEFT's rules are many (patterns, layers, exclusions, names of transformers 4) and change with it, so
they are not written down a second time here: PEFT attaches adapters to a copy of the model without
memory, and what it has attached is read off.
"""

import copy
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from torch import nn
from transformers import PreTrainedModel

from megablocks_utils.errors import CheckpointError
from megablocks_utils.lora.adapter_config import AdapterConfigFile
from megablocks_utils.lora.linear_choice import has_end, list_weights, target_ends
from megablocks_utils.lora.peft_format import linear_key

__all__ = [
    "PeftTarget",
    "attach_on_meta",
    "find_loadable",
    "find_peft_targets",
    "split_by_reach",
]

_ADAPTER_NAME = "default"
_BASE_LAYER = ".base_layer"
# What PEFT and torch raise for configurations that contradict themselves or the model.
_REFUSALS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ImportError,
    re.error,
)


class PeftTarget(NamedTuple):
    """Say what PEFT attaches to one linear layer, or to one parameter of an experts module.

    Attributes:
        key: what the names of its tensors in a file begin with.
        rank: of the adapter.
        scaling: factor of B @ A.
        is_parameter: whether it is on a parameter, not on a linear layer.
    """

    key: str
    rank: int
    scaling: float
    is_parameter: bool


def find_peft_targets(
    config: AdapterConfigFile, model: PreTrainedModel
) -> Mapping[str, PeftTarget]:
    """Return what PEFT attaches, by the name of the linear layer or the parameter in the model.

    Args:
        config: of the adapter.
        model: as transformers builds it, on meta or not; it stays as it is.

    Raises:
        CheckpointError: PEFT refuses the configuration.
    """
    peft_config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **config.targeting)
    try:
        return attach_on_meta(peft_config, model)
    except _REFUSALS as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{config.path} cannot be used with this model: {reason}") from error


def attach_on_meta(peft_config: LoraConfig, model: PreTrainedModel) -> Mapping[str, PeftTarget]:
    """Return what PEFT attaches to a model, which stays as it is; PEFT raises what it refuses."""
    bare = _copy_on_meta(model)
    with warnings.catch_warnings():
        # Of patterns that match nothing: they have no effect.
        warnings.simplefilter("ignore")
        inject_adapter_in_model(peft_config, bare, _ADAPTER_NAME)
    targets = {}
    for name, module in bare.named_modules():
        if isinstance(module, LoraLayer) and _ADAPTER_NAME in module.r:
            rank, scaling = module.r[_ADAPTER_NAME], float(module.scaling[_ADAPTER_NAME])
            is_parameter = isinstance(module, ParamWrapper)
            targets[_name_of(name, module)] = PeftTarget(name, rank, scaling, is_parameter)
    return targets


def find_loadable(model: PreTrainedModel, modules: Iterable[str]) -> list[str]:
    """Return the modules whose adapters PEFT finds again when it loads them.

    It renames the tensors of a file as transformers renames those of a checkpoint of old, which
    can break names that are right already.
    """
    names = {linear_key(name, "A"): name for name in modules}
    tensors = {key: torch.empty(0, device="meta") for key in names}
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), tensors)
    return [name for key, name in names.items() if key in loaded]


def split_by_reach(
    model: PreTrainedModel, linears: Collection[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the ends of names by which PEFT finds just these linear layers.

    Where experts of a family were linear layers in transformers 4, PEFT takes some last names
    (gate_proj, w1) for theirs, whatever stands before. Such layers are found by their weight.

    Returns:
        ends for `target_modules`, and others that followed by `.weight` are `target_parameters`.
    """
    ends = target_ends(model, linears, [name for name, _ in model.named_modules()])
    modules = tuple(end for end in ends if not _is_taken_for_expert(model, end))
    others = [end for end in ends if end not in modules]
    by_weight = [name for name in linears if has_end(name, others)]
    return modules, target_ends(model, by_weight, list_weights(model))


def _is_taken_for_expert(model: PreTrainedModel, end: str) -> bool:
    config = LoraConfig(target_modules=[end])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # it misses the other projections of an expert
        return True
    return config.target_modules != {end}


def _name_of(name: str, module: object) -> str:
    if isinstance(module, ParamWrapper):
        return f"{name.replace(_BASE_LAYER, '')}.{module.parameter_name}"
    return name


def _copy_on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the structure of a model; a parameter that is tied stays tied."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=False
        )
    return copy.deepcopy(model, memo)
