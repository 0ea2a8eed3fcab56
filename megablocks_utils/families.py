"""What is known of a model family that neither its config nor its modules say.

transformers marks the modules that follow its experts interface, and the marks say what the experts
are. A few follow it in all but the mark. This is the only place that names a family.

Torch-free.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["UNMARKED_EXPERTS", "UnmarkedExperts"]


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
