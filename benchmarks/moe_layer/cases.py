"""Cases of the layer benchmark: shapes, modes of training, kinds of routing."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

from benchmarks.harness.case import LayerShape


@dataclass(frozen=True)
class Mode:
    """What is trained: the experts' weights, adapters of a rank on both projections, or neither.

    Gradients of tokens and routing weights are taken in every mode.
    """

    name: str
    trains_weights: bool = False
    rank: int = 0


@dataclass(frozen=True)
class Case:
    """One measurement of every contender."""

    shape: LayerShape
    mode: Mode
    routing: str
    num_tokens: int
    dtype: str = "bfloat16"

    def label(self) -> str:
        """Name the case in a line, for selection and for tables."""
        return f"{self.shape.name}, {self.mode.name}, {self.routing}, {self.num_tokens} tokens"

    def describe(self) -> dict:
        """Return the case as the JSON has it."""
        return asdict(self.shape) | {
            "mode": self.mode.name,
            "routing": self.routing,
            "tokens": self.num_tokens,
            "dtype": self.dtype,
        }


MIXTRAL = LayerShape("Mixtral-8x7B", 4096, 14336, num_experts=8, top_k=2)
QWEN3 = LayerShape("Qwen3-30B-A3B", 2048, 768, num_experts=128, top_k=8)
GPT_OSS = LayerShape("GPT-OSS-20B-like", 2880, 2880, num_experts=32, top_k=4)
SMALL = LayerShape("small", 1024, 512, num_experts=16, top_k=2)
TINY = LayerShape("tiny", 64, 96, num_experts=4, top_k=2)
GPU_SHAPES = (MIXTRAL, QWEN3, GPT_OSS, SMALL)
CPU_SHAPES = (
    LayerShape("Mixtral-like", 512, 1792, num_experts=8, top_k=2),
    LayerShape("Qwen3-like", 512, 192, num_experts=64, top_k=8),
)

FULL = Mode("full", trains_weights=True)
FROZEN = Mode("frozen")
LORA16 = Mode("lora16", rank=16)
LORA64 = Mode("lora64", rank=64)
# By importance: what the aims are about is measured first, in case the time runs out.
MODES = (LORA16, FULL, FROZEN, LORA64)
ROUTINGS = ("uniform", "zipf", "all-to-one")


def order_cases(
    shapes: tuple[LayerShape, ...],
    modes: tuple[Mode, ...],
    routings: tuple[str, ...],
    num_tokens: int,
    dtype: str = "bfloat16",
) -> Iterator[Case]:
    """Yield every combination, even routing first, then by mode, then by shape."""
    for routing, mode, shape in product(routings, modes, shapes):
        yield Case(shape, mode, routing, num_tokens, dtype)
