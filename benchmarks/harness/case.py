"""What a benchmark is run on: sizes of the experts of a layer, and cases chosen by words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
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


def has_words(label: str, words: str) -> bool:
    """Say whether a label holds every word of a selection (case does not matter)."""
    return all(word in label.lower() for word in words.lower().split())
