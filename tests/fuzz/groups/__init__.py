"""The cases, by what they mutate."""

from collections.abc import Mapping
from types import MappingProxyType

from tests.fuzz.cases import Generate
from tests.fuzz.groups.adapters import adapter_cases
from tests.fuzz.groups.checkpoints import manifest_cases
from tests.fuzz.groups.data import data_cases
from tests.fuzz.groups.launchers import launcher_cases
from tests.fuzz.groups.model_config import config_cases
from tests.fuzz.groups.options import option_cases, pair_cases
from tests.fuzz.groups.plans import check_cases, plan_cases
from tests.fuzz.groups.tokenizers import template_cases, tokenizer_cases
from tests.fuzz.groups.weights import index_cases, weights_cases

__all__ = ["GROUPS"]

GROUPS: Mapping[str, Generate] = MappingProxyType(
    {
        "options": option_cases,
        "pairs": pair_cases,
        "config": config_cases,
        "weights": weights_cases,
        "index": index_cases,
        "tokenizer": tokenizer_cases,
        "template": template_cases,
        "data": data_cases,
        "manifest": manifest_cases,
        "check": check_cases,
        "adapter": adapter_cases,
        "plan": plan_cases,
        "launcher": launcher_cases,
    }
)
