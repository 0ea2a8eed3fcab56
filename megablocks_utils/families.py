"""What is known of a model family that its config and its modules do not say.

One record a family, as few facts as can be. How its parameters are named in memory is
transformers' doing and the same for all families (see `checkpoint.layouts`); how its checkpoints
on the Hub name them differs, and nothing in a config says it.

Torch-free.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "FAMILIES",
    "SUPPORTED_MODEL_TYPES",
    "UNMARKED_EXPERTS",
    "ModelFamily",
    "UnmarkedExperts",
    "describe_supported",
]


@dataclass(frozen=True)
class ModelFamily:
    """Say how the checkpoints of a family name the parts of an MoE layer.

    Attributes:
        naming: what messages call this way of naming; families can share one.
        moe_block: name of the block that holds router and experts.
        projections: names of an expert's "gate", "up" and "down".
    """

    naming: str
    moe_block: str
    projections: Mapping[str, str]


_QWEN_MOE = ModelFamily(
    naming="qwen_moe",
    moe_block="mlp",
    projections=MappingProxyType({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
)

FAMILIES: Mapping[str, ModelFamily] = MappingProxyType(
    {
        "mixtral": ModelFamily(
            naming="mixtral",
            moe_block="block_sparse_moe",
            projections=MappingProxyType({"gate": "w1", "up": "w3", "down": "w2"}),
        ),
        "qwen3_moe": _QWEN_MOE,
        "olmoe": _QWEN_MOE,
    }
)
"""The families that are trained here, by transformers' `model_type`."""

SUPPORTED_MODEL_TYPES = tuple(FAMILIES)


def describe_supported() -> str:
    """Return the supported model types as messages list them."""
    return ", ".join(SUPPORTED_MODEL_TYPES)


@dataclass(frozen=True)
class UnmarkedExperts:
    """Say of a class of experts what transformers' mark would have said.

    Attributes:
        is_transposed: whether its weights are stored (in, out).
        is_weighted_before: whether its block weights the tokens before the experts instead of the
            experts' results, and gives all tokens to all experts.
    """

    is_transposed: bool = False
    is_weighted_before: bool = False


UNMARKED_EXPERTS: Mapping[str, UnmarkedExperts] = MappingProxyType(
    {
        "Llama4TextExperts": UnmarkedExperts(is_transposed=True, is_weighted_before=True),
        "LongcatFlashExperts": UnmarkedExperts(),
        "Step3p7Experts": UnmarkedExperts(),
    }
)
"""Experts without the mark, by the name of their class."""
