"""Examples that are held out of training, chosen by the seed."""

import hashlib

import numpy as np

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.examples import TokenizedExamples

__all__ = ["ExamplePart", "hold_out"]

_STREAM = 0x5E1D  # so that the choice is not the order of an epoch


class ExamplePart(TokenizedExamples):
    """Hold some of the examples, in the order of the whole.

    Args:
        whole: all of them.
        indices: which ones, ascending.
    """

    def __init__(self, whole: TokenizedExamples, indices: np.ndarray) -> None:
        vars(self).update(vars(whole))
        self._whole, self._indices = whole, indices
        self.lengths = whole.lengths[indices]
        self.num_label_tokens = whole.num_label_tokens[indices]
        bounds = np.searchsorted(indices, np.cumsum([0, *whole.counts]))
        self.counts = tuple(np.diff(bounds).tolist())

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and labels of one example, each of shape (tokens,), int64."""
        return self._whole[int(self._indices[index])]

    def checksum(self) -> str:
        """Return the SHA-256 of the whole's checksum and of which examples these are."""
        digest = hashlib.sha256(self._whole.checksum().encode())
        digest.update(self._indices.astype("<i8").tobytes())
        return digest.hexdigest()


def hold_out(
    examples: TokenizedExamples, fraction: float, seed: int
) -> tuple[TokenizedExamples, TokenizedExamples]:
    """Split examples into those to train on and those held out: at least one of each.

    Which ones follows from the seed alone, so every rank and every resumed run chooses the same.

    Raises:
        DataError: there is one example only.
    """
    number = len(examples)
    if number < 2:
        raise DataError(
            f"eval_fraction is {fraction}, but data_path has {number} example: it must have at "
            "least 2.",
            parameters=("eval_fraction", "data_path"),
        )
    num_held_out = min(max(1, round(fraction * number)), number - 1)
    sequence = np.random.SeedSequence([seed, _STREAM, 0])
    generator = np.random.RandomState(np.random.MT19937(sequence))
    is_held_out = np.zeros(number, dtype=bool)
    is_held_out[generator.permutation(number)[:num_held_out]] = True
    kept, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    return ExamplePart(examples, kept), ExamplePart(examples, held_out)
