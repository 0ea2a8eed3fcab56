"""Choose which rank of an ep group holds which experts, so that measured loads even out."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from megablocks_utils.errors import ConfigurationError

__all__ = ["BALANCED", "CONTIGUOUS", "LayerBalance", "MeasuredLoads", "assign_balanced"]

CONTIGUOUS, BALANCED = "contiguous", "balanced"


def assign_balanced(loads: Sequence[float], num_ranks: int) -> tuple[int, ...]:
    """Return the experts of the first rank, then of the second: each has as many.

    Greedy, the busiest expert first, to the rank with the least load that has room; a rank's
    experts are in ascending order. The contiguous placement, where that is as even.
    """
    room = len(loads) // num_ranks
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    sums = [0.0] * num_ranks
    for expert in sorted(range(len(loads)), key=lambda expert: -loads[expert]):
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < room), key=sums.__getitem__)
        ranks[rank].append(expert)
        sums[rank] += loads[expert]
    placed = tuple(expert for experts in ranks for expert in sorted(experts))
    contiguous = tuple(range(len(loads)))
    is_better = max(sums) < max(_sum_by_rank(loads, contiguous, num_ranks))
    return placed if is_better else contiguous


@dataclass(frozen=True)
class LayerBalance:
    """How even the ranks of an ep group are, in one layer.

    Attributes:
        placed: the experts in the order of the ranks, see `assign_balanced`.
        before: share of the rows on the busiest rank of the contiguous placement, the mean of the
            measured steps: in each of them the others wait for it.
        after: likewise where they are placed.
    """

    placed: tuple[int, ...]
    before: float
    after: float


@dataclass(frozen=True)
class MeasuredLoads:
    """Hold how rows were spread over the experts of each layer.

    Attributes:
        source: the file they were read from.
        layers: by name of the experts, in each measured step (rows, share of each expert).
    """

    source: str
    layers: Mapping[str, Sequence[tuple[int, Sequence[float]]]]

    @classmethod
    def collect(cls, source: str, lines: Iterable[tuple[str, int, Sequence[float]]]) -> Self:
        """Sort lines, (layer, rows, share of each expert), by layer."""
        layers: dict[str, list[tuple[int, Sequence[float]]]] = {}
        for layer, rows, share in lines:
            layers.setdefault(layer, []).append((rows, array("d", share)))
        return cls(source, layers)

    def check(self, num_experts: Mapping[str, int], parameter: str) -> None:
        """Refuse loads of another model.

        Args:
            num_experts: of each layer that the model has.
            parameter: that names the file.

        Raises:
            ConfigurationError: naming the first layer that differs.
        """
        for layer in dict.fromkeys((*num_experts, *self.layers)):
            wanted = str(num_experts.get(layer, "no such layer"))
            found = {str(len(share)) for _, share in self.layers.get(layer, ())} or {"not in it"}
            if found != {wanted}:
                seen = " and ".join(sorted(found))
                raise ConfigurationError(
                    f"{parameter} is {self.source}, but its experts of {layer} are {seen}, and "
                    f"those of this model are {wanted}: it must be of this model.",
                    parameters=(parameter,),
                )

    def balance(self, layer: str, num_ranks: int) -> LayerBalance:
        """Place the experts of a layer by all its rows; no communication, the same everywhere."""
        steps = self.layers[layer]
        loads = [
            sum(parts)
            for parts in zip(*([n * s for s in share] for n, share in steps), strict=True)
        ]
        placed, contiguous = assign_balanced(loads, num_ranks), tuple(range(len(loads)))
        busiest = [
            [max(_sum_by_rank(share, order, num_ranks)) for _, share in steps]
            for order in (contiguous, placed)
        ]
        before, after = (sum(shares) / len(shares) for shares in busiest)
        return LayerBalance(placed, before, after)


def _sum_by_rank(loads: Sequence[float], placed: Sequence[int], num_ranks: int) -> list[float]:
    room = len(placed) // num_ranks
    by_slot = [loads[expert] for expert in placed]
    return [sum(by_slot[n * room : (n + 1) * room]) for n in range(num_ranks)]
