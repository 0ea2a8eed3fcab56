"""Load training data: records in, token ids and labels out, the same on every rank.

One process of each machine reads and tokenizes the source, or finds the tokens in the cache; all of
its ranks map them. So every rank knows every example's length and can plan every step without
communication.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megablocks_utils.errors import DataError
from megablocks_utils.processes.agreement import gather_from_all_ranks, raise_on_all_ranks
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.training.data.cut import KeptExamples, cut_examples, read_cut, write_cut
from megablocks_utils.training.data.formats import check_records
from megablocks_utils.training.data.sources import read_records
from megablocks_utils.training.data.template_date import date_written_out, writes_date
from megablocks_utils.training.data.token_cache import PreparedTokens, prepare_tokens
from megablocks_utils.training.data.token_files import StoredTokens, TokenWriter
from megablocks_utils.training.data.token_key import (
    FileState,
    digest_file,
    digest_records,
    file_state,
    token_key,
)
from megablocks_utils.training.data.training_templates import choose_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megablocks_utils.config import DataConfig

__all__ = ["TokenizedExamples", "load_examples"]

TOKENIZER_BATCH = 64
_ALONE = LaunchEnvironment()


class TokenizedExamples:
    """Hold token ids and labels of all examples, cut, each with a label to learn.

    The label of an example's first token is always -100 (see `StoredTokens`).

    Args:
        tokens: all of the data.
        kept: which examples of it, and how much of each.
        notes: what the user should know of where they are kept, a sentence each.

    Attributes:
        lengths: tokens of each example, shape (examples,).
        num_label_tokens: labels to learn of each example, shape (examples,), all at least 1.
        num_cut: examples that were longer than the limit.
        num_dropped: examples left out because no label was left to learn.
        format_name: the columns they were read from.
        ignored_keys: the records' keys that have no meaning for training.
        template_date: the day that the chat template was told, as ISO text; None where it does not
            ask for it.
    """

    def __init__(self, tokens: StoredTokens, kept: KeptExamples, notes: Sequence[str] = ()) -> None:
        self.lengths = kept.lengths
        self.num_label_tokens = kept.num_label_tokens
        self.num_cut = kept.num_cut
        self.num_dropped = kept.num_dropped
        self.format_name = str(tokens.contents["format_name"])
        self.ignored_keys = tuple(tokens.contents["ignored_keys"])
        self.template_date: str | None = tokens.contents["template_date"]
        self.notes = tuple(notes)
        self._tokens = tokens
        self._kept = kept

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and labels of one example, each of shape (tokens,), int64."""
        start = int(self._kept.starts[index])
        place = slice(start, start + int(self.lengths[index]))
        input_ids, labels = self._tokens.input_ids[place], self._tokens.labels_of(place)
        return input_ids.astype(np.int64), labels.astype(np.int64)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (self[index] for index in range(len(self)))

    def checksum(self) -> str:
        """Return the SHA-256 of all examples in order, tokens and labels."""
        return self._kept.checksum

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if a token or label lies outside the model's vocabulary."""
        largest = self._kept.largest_token
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
) -> TokenizedExamples:
    """Read, check and tokenize the data of a run, in file order.

    Examples longer than ``config.max_seq_length`` are cut; those left with nothing to learn are
    dropped, because a batch of nothing but them has no loss. Both are counted.

    **Collective:** every rank must call; while the first of each machine tokenizes, the others
    wait.

    Args:
        config: ``data_path``, ``chat_template`` and ``max_seq_length`` are read.
        tokenizer: may be None for data that is already tokenized. It is left with the chat template
            that it is to be saved with.
        launch: which process this is.
        today: the day that a chat template which asks for the date is told; None: that of now.

    Raises:
        ConfigurationError: on every rank: there is no such chat template.
        DataError: likewise: the source or a record is unusable, or no example is left.
    """
    template = raise_on_all_ranks(lambda: choose_chat_template(config.chat_template, tokenizer))
    with template.in_use():
        prepare = partial(_prepare, config, tokenizer, today or date.today())
        return _load_tokens(config, prepare, launch)


def _load_tokens(
    config: "DataConfig", prepare: Callable[[], PreparedTokens], launch: LaunchEnvironment
) -> TokenizedExamples:
    host = socket.gethostname()
    prepared = gather_from_all_ranks(lambda: (host, prepare() if launch.local_rank == 0 else None))
    near = [tokens for name, tokens in prepared[: launch.rank + 1] if tokens and name == host]
    seen = near[-1] if near and near[-1].folder.is_dir() else None
    # A container a rank, or another order of ranks: this rank is on its own.
    own = raise_on_all_ranks(lambda: seen or prepare())
    try:
        return raise_on_all_ranks(lambda: _open(own, config))
    finally:
        if launch.local_rank == 0 or seen is None:
            own.release()


def _open(prepared: PreparedTokens, config: "DataConfig") -> TokenizedExamples:
    limit = config.max_seq_length
    try:
        tokens = StoredTokens.open(prepared.folder)
    except OSError as error:
        raise DataError(
            f"the tokens of data_path {config.data_path} cannot be read from {prepared.folder} "
            f"({error.strerror or error})",
            parameters=("data_path",),
        ) from error
    kept = read_cut(prepared.folder, limit) or cut_examples(tokens, limit)
    if not len(kept.starts):
        raise DataError(
            f"data_path {config.data_path} leaves nothing to learn: none of its "
            f"{len(tokens.ends)} examples has a label within max_seq_length {limit} tokens",
            parameters=("data_path", "max_seq_length"),
        )
    return TokenizedExamples(tokens, kept, prepared.notes)


def _prepare(
    config: "DataConfig", tokenizer: "PreTrainedTokenizerBase | None", today: date
) -> PreparedTokens:
    """Tokenize the data, or find its tokens, and cut them to the limit."""
    source = _Source(config.data_path)
    key = token_key(source.digest, tokenizer, today)
    prepared = prepare_tokens(key, partial(_write_tokens, source, tokenizer, today))
    folder, limit = prepared.folder, config.max_seq_length
    # Where another user's cache cannot be written, every rank cuts for itself.
    with suppress(OSError):
        if read_cut(folder, limit) is None:
            write_cut(cut_examples(StoredTokens.open(folder), limit), folder, limit)
    return prepared


class _Source:
    """A data set, of which no more than a batch of records is held, and the checksum of it.

    Args:
        data_path: a file or a Hub dataset.
    """

    def __init__(self, data_path: str) -> None:
        self.data_path = data_path
        self._state: FileState | None = None
        try:
            self.digest, self._state = digest_file(Path(data_path))
        except (OSError, ValueError):  # no file; `read_records` knows what to say of others
            self.digest = digest_records(read_records(data_path))

    def check_unchanged(self) -> None:
        """Raise DataError if its file has changed since its checksum was taken."""
        if self._state is not None and file_state(Path(self.data_path)) != self._state:
            raise DataError(
                f"data_path {self.data_path} was changed while it was read; start again when it is "
                "complete",
                parameters=("data_path",),
            )


def _write_tokens(
    source: _Source,
    tokenizer: "PreTrainedTokenizerBase | None",
    today: date,
    writer: TokenWriter,
) -> dict[str, Any]:
    """Check all records, then tokenize them: so a bad one is told at once."""
    checked = check_records(read_records(source.data_path))
    data_format = checked.data_format
    if data_format.needs_tokenizer and tokenizer is None:
        raise DataError(
            f"data_path {source.data_path} holds text ({data_format.name}), but the model has no "
            "tokenizer",
            parameters=("data_path",),
        )
    records = read_records(source.data_path)
    with date_written_out(tokenizer, today):
        while batch := list(islice(records, TOKENIZER_BATCH)):
            writer.append(data_format.encode(batch, tokenizer))
    source.check_unchanged()
    return {
        "format_name": data_format.name,
        "ignored_keys": checked.ignored_keys,
        "template_date": today.isoformat() if writes_date(tokenizer) else None,
    }
