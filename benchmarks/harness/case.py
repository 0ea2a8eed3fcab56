"""Sizes of the experts of a layer, as the benchmarks name them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of the experts of one layer."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    @property
    def experts_bytes(self) -> int:
        """Bytes of all experts' weights of a layer, fp32."""
        return 4 * 3 * self.num_experts * self.hidden_size * self.intermediate_size
