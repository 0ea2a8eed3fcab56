"""What neither a model's config nor its modules say of it; no family is named anywhere else."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["READABLE_CONFIGS", "UNMARKED_EXPERTS", "ReadableConfig", "UnmarkedExperts"]


class UnmarkedExperts(NamedTuple):
    """Say what the mark of transformers' experts interface would have said; see `ExpertSpec`."""

    is_transposed: bool = False
    is_weighted_before: bool = False


class ReadableConfig(NamedTuple):
    """Say what a plan needs beside a config, by `model_type`, where it builds no model."""

    qk_norm: str = "none"
    routes_in_fp32: bool = True


UNMARKED_EXPERTS: Mapping[str, UnmarkedExperts] = MappingProxyType(
    {
        "Llama4TextExperts": UnmarkedExperts(is_transposed=True, is_weighted_before=True),
        "LongcatFlashExperts": UnmarkedExperts(),
        "Step3p7Experts": UnmarkedExperts(),
    }
)
READABLE_CONFIGS: Mapping[str, ReadableConfig] = MappingProxyType(
    {
        "mixtral": ReadableConfig(),
        "qwen3_moe": ReadableConfig(qk_norm="head", routes_in_fp32=False),
        "olmoe": ReadableConfig(qk_norm="whole", routes_in_fp32=False),
        "deepseek_v3": ReadableConfig(),
    }
)
