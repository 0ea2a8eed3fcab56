"""Load training data: records in, token ids and labels out, the same on every rank.

Every rank reads and tokenizes the whole source, so that all of them know every example's length and
can plan every step without communication.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.formats import DataFormat, check_records
from megablocks_utils.training.data.sources import Record, read_records
from megablocks_utils.training.data.text import IGNORED_LABEL, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megablocks_utils.config import DataConfig

__all__ = ["TokenizedExamples", "load_examples"]

TOKENIZER_BATCH = 1000


class TokenizedExamples:
    """Hold token ids and labels of all examples in two flat arrays.

    The label of an example's first token is always -100: nothing stands before it to predict it
    from, and in a packed row the example before must not.

    Args:
        encoded: token ids and labels of each example, already cut, each with a label to learn.
        num_cut: examples that were longer than the limit.
        num_dropped: examples left out because no label was left to learn.
        format_name: the columns they were read from.
        ignored_keys: the records' keys that have no meaning for training.

    Attributes:
        lengths: tokens of each example, shape (examples,).
        num_label_tokens: labels to learn of each example, shape (examples,), all at least 1.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        *,
        num_cut: int = 0,
        num_dropped: int = 0,
        format_name: str = "",
        ignored_keys: tuple[str, ...] = (),
    ) -> None:
        self.lengths = np.array([len(ids) for ids, _ in encoded], dtype=np.int64)
        self.num_cut = num_cut
        self.num_dropped = num_dropped
        self.format_name = format_name
        self.ignored_keys = ignored_keys
        self._ends = np.cumsum(self.lengths)
        self._input_ids = np.fromiter((t for ids, _ in encoded for t in ids), dtype=np.int64)
        self._labels = np.fromiter((t for _, labels in encoded for t in labels), dtype=np.int64)
        starts = self._ends - self.lengths
        self._labels[starts] = IGNORED_LABEL
        learned = (self._labels != IGNORED_LABEL).astype(np.int64)
        self.num_label_tokens = np.add.reduceat(learned, starts)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and labels of one example, each of shape (tokens,)."""
        end = self._ends[index]
        place = slice(end - self.lengths[index], end)
        return self._input_ids[place], self._labels[place]

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (self[index] for index in range(len(self)))

    def checksum(self) -> str:
        """Return the SHA-256 of all examples in order, tokens and labels."""
        digest = hashlib.sha256()
        for array in (self.lengths, self._input_ids, self._labels):
            digest.update(array.astype("<i8", copy=False).data)
        return digest.hexdigest()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if a token or label lies outside the model's vocabulary."""
        largest = int(max(self._input_ids.max(), self._labels.max()))
        if largest >= vocab_size:
            raise DataError(
                f"the data holds token {largest}, but the model's vocabulary has {vocab_size} "
                f"tokens (0 to {vocab_size - 1})"
            )


def load_examples(
    config: "DataConfig", tokenizer: "PreTrainedTokenizerBase | None"
) -> TokenizedExamples:
    """Read, check and tokenize the data of a run, in file order.

    Examples longer than ``config.max_seq_length`` are cut; those left with nothing to learn are
    dropped, because a batch of nothing but them has no loss. Both are counted.

    Args:
        config: ``data_path`` and ``max_seq_length`` are read.
        tokenizer: may be None for data that is already tokenized.

    Raises:
        DataError: the source or a record is unusable, or no example is left.
    """
    records = read_records(config.data_path)
    checked = check_records(records)
    encoded = _encode(records, checked.data_format, tokenizer, config.data_path)
    limit = config.max_seq_length
    num_cut = sum(len(ids) > limit for ids, _ in encoded)
    kept = [(ids[:limit], labels[:limit]) for ids, labels in encoded if _has_target(labels[:limit])]
    if not kept:
        raise DataError(
            f"data_path {config.data_path} leaves nothing to learn: none of its {len(encoded)} "
            f"examples has a label within max_seq_length {limit} tokens",
            parameters=("data_path", "max_seq_length"),
        )
    num_dropped = len(encoded) - len(kept)
    return TokenizedExamples(
        kept,
        num_cut=num_cut,
        num_dropped=num_dropped,
        format_name=checked.data_format.name,
        ignored_keys=checked.ignored_keys,
    )


def _encode(
    records: Sequence[Record],
    data_format: DataFormat,
    tokenizer: "PreTrainedTokenizerBase | None",
    data_path: str,
) -> list[Encoded]:
    if tokenizer is None and data_format.needs_tokenizer:
        raise DataError(
            f"data_path {data_path} holds text ({data_format.name}), but the model has no "
            "tokenizer",
            parameters=("data_path",),
        )
    encoded: list[Encoded] = []
    for start in range(0, len(records), TOKENIZER_BATCH):
        encoded += data_format.encode(records[start : start + TOKENIZER_BATCH], tokenizer)
    return encoded


def _has_target(labels: Sequence[int]) -> bool:
    """Say whether a token after the first is learned (the first is never predicted)."""
    return any(label != IGNORED_LABEL for label in labels[1:])
