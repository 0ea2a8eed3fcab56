"""Load training data: records in, token ids and labels out, the same on every rank.

Every rank knows every example's length and can plan every step without communication.
"""

import hashlib
from collections.abc import Iterator, Sequence
from datetime import date
from typing import TYPE_CHECKING

import numpy as np

from megablocks_utils.errors import DataError
from megablocks_utils.processes.agreement import raise_on_all_ranks
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.training.data.source_tokens import (
    SourceTokens,
    Tokenizing,
    TrackRecords,
    load_source,
    untracked,
)
from megablocks_utils.training.data.sources import DatasetPart, check_part
from megablocks_utils.training.data.training_templates import choose_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megablocks_utils.config import DataConfig

__all__ = ["TokenizedExamples", "load_examples"]

_ALONE = LaunchEnvironment()


class TokenizedExamples:
    """Hold token ids and labels of all examples, cut, each with a label to learn.

    The label of an example's first token is always -100 (see `StoredTokens`).

    Args:
        sources: of the data, in their order.

    Attributes:
        lengths: tokens of each example, shape (examples,).
        num_label_tokens: labels to learn of each example, shape (examples,), all at least 1.
        counts: examples of each source.
        num_cut: examples that were longer than the limit.
        num_dropped: examples left out because no label was left to learn.
        format_name: the columns they were read from.
        ignored_keys: the records' keys that have no meaning for training.
        template_date: the day that the chat template was told, as ISO text; None where it does not
            ask for it.
        notes: what the user should know of where the tokens are kept, a sentence each.
    """

    def __init__(self, sources: Sequence[SourceTokens]) -> None:
        kept, contents = [s.kept for s in sources], [s.tokens.contents for s in sources]
        self.lengths = _joined([k.lengths for k in kept])
        self.num_label_tokens = _joined([k.num_label_tokens for k in kept])
        self.counts = tuple(len(k.lengths) for k in kept)
        self.num_cut = sum(k.num_cut for k in kept)
        self.num_dropped = sum(k.num_dropped for k in kept)
        self.format_name = "; ".join(dict.fromkeys(str(c["format_name"]) for c in contents))
        self.ignored_keys = tuple(dict.fromkeys(key for c in contents for key in c["ignored_keys"]))
        self.template_date: str | None = contents[0]["template_date"]
        self.notes = tuple(dict.fromkeys(note for s in sources for note in s.notes))
        self._sources = tuple(sources)
        self._firsts = np.cumsum([0, *self.counts])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and labels of one example, each of shape (tokens,), int64."""
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        source = self._sources[number]
        start = int(source.kept.starts[index - self._firsts[number]])
        place = slice(start, start + int(self.lengths[index]))
        input_ids, labels = source.tokens.input_ids[place], source.tokens.labels_of(place)
        return input_ids.astype(np.int64), labels.astype(np.int64)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (self[index] for index in range(len(self)))

    def checksum(self) -> str:
        """Return the SHA-256 of all examples in order, tokens and labels, source by source."""
        checksums = [source.kept.checksum for source in self._sources]
        if len(checksums) == 1:
            return checksums[0]
        return hashlib.sha256(" ".join(checksums).encode()).hexdigest()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if a token or label lies outside the model's vocabulary."""
        largest = max(source.kept.largest_token for source in self._sources)
        if largest >= vocab_size:
            raise DataError(
                f"the data holds token {largest}, but the model's vocabulary has {vocab_size} "
                f"tokens (0 to {vocab_size - 1})"
            )


def load_examples(
    config: "DataConfig",
    tokenizer: "PreTrainedTokenizerBase | None",
    launch: LaunchEnvironment = _ALONE,
    *,
    today: date | None = None,
    track: TrackRecords = untracked,
) -> TokenizedExamples:
    """Read, check and tokenize the data of a run, in the order of the sources and their records.

    Examples longer than ``config.max_seq_length`` are cut; those left with nothing to learn are
    dropped, because a batch of nothing but them has no loss. Both are counted.

    **Collective:** every rank must call; while the first of each machine tokenizes, the others
    wait.

    Args:
        config: ``data_path``, ``dataset_config``, ``dataset_split``, ``chat_template`` and
            ``max_seq_length`` are read.
        tokenizer: may be None for data that is already tokenized. It is left with the chat template
            that it is to be saved with.
        launch: which process this is.
        today: the day that a chat template which asks for the date is told; None: that of now.
        track: shows how far the records of a source are tokenized.

    Raises:
        ConfigurationError: on every rank: there is no such chat template.
        DataError: likewise: a source or a record is unusable, or no example of a source is left.
    """
    part = DatasetPart(config.dataset_config, config.dataset_split)
    raise_on_all_ranks(lambda: check_part(config.data_path, part))
    template = raise_on_all_ranks(lambda: choose_chat_template(config.chat_template, tokenizer))
    with template.in_use():
        how = Tokenizing(tokenizer, today or date.today(), config.max_seq_length, part, track)
        return TokenizedExamples([load_source(path, how, launch) for path in config.data_path])


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
