"""The order in which an epoch goes through the examples: a function of seed and epoch alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["ExampleOrder", "draw_mixture", "epoch_order", "permute"]


def permute(number: int, *seeds: int) -> np.ndarray:
    """Return the numbers below `number` in an order that the seeds give.

    numpy promises ``RandomState`` the same numbers in every version, so that a resumed run finds
    its place after an upgrade.
    """
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seeds)))
    return generator.permutation(number)


def epoch_order(num_examples: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Return the order of an epoch's examples."""
    if not shuffle:
        return list(range(num_examples))
    return permute(num_examples, seed, epoch).tolist()


def draw_mixture(counts: Sequence[int], weights: Sequence[float], seed: int) -> np.ndarray:
    """Return examples of several sources, drawn in shares until the first source is used up.

    Args:
        counts: examples of each source; they are numbered one source after the other.
        weights: of the sources; only their ratios matter.
        seed: of the draws.

    Returns:
        The numbers of the examples, (drawn,); each source's come in its order.
    """
    from datasets import Dataset, interleave_datasets

    starts = np.cumsum([0, *counts])
    sources = [
        Dataset.from_dict({"example": np.arange(start, stop)})
        for start, stop in zip(starts[:-1], starts[1:], strict=True)
    ]
    shares = (np.array(weights) / sum(weights)).tolist()
    drawn = interleave_datasets(sources, shares, seed, stopping_strategy="first_exhausted")
    return np.asarray(drawn.with_format("numpy")["example"][:])


@dataclass(frozen=True)
class ExampleOrder:
    """The examples of every epoch, in order.

    Without weights that is all of them. With weights, every epoch draws from the sources in the
    same sequence, so all epochs are equally long; which of a source's examples come is the epoch's.

    Attributes:
        counts: examples of each source.
        seed: of the run.
        shuffle: whether each epoch has an order of its own.
        draws: from `draw_mixture`; None: all examples.
    """

    counts: tuple[int, ...]
    seed: int
    shuffle: bool
    draws: np.ndarray | None = None

    def __len__(self) -> int:
        return sum(self.counts) if self.draws is None else len(self.draws)

    def of_epoch(self, epoch: int) -> list[int]:
        """Return the examples of an epoch, counted from 0."""
        if self.draws is None:
            return epoch_order(sum(self.counts), self.seed, epoch, self.shuffle)
        if not self.shuffle:
            return self.draws.tolist()
        starts = np.cumsum([0, *self.counts])
        shuffled = [
            start + permute(count, self.seed, epoch, source)
            for source, (start, count) in enumerate(zip(starts, self.counts, strict=False))
        ]
        return np.concatenate(shuffled)[self.draws].tolist()
