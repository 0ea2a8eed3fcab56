"""A low-rank addition to the weights of experts, as the backends take it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """Add `scaling * lora_b[e] @ lora_a[e]` to the weight of each local expert e of a projection.

    No backend computes that product: rows pass the two factors one after the other.

    Attributes:
        lora_a: (L, r, in).
        lora_b: (L, out, r).
        scaling: lora_alpha / r.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
