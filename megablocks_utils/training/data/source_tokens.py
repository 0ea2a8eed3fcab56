"""Tokenize one source of data, once a machine.

One process of each machine reads and tokenizes the source, or finds the tokens in the cache; all of
its ranks map them.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megablocks_utils.errors import DataError
from megablocks_utils.processes.agreement import gather_from_all_ranks, raise_on_all_ranks
from megablocks_utils.processes.launch import LaunchEnvironment
from megablocks_utils.training.data.cut import KeptExamples, cut_examples, read_cut, write_cut
from megablocks_utils.training.data.formats import DataFormat, check_records
from megablocks_utils.training.data.sources import DatasetPart, read_records
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TOKENIZER_BATCH", "SourceTokens", "Tokenizing", "TrackRecords", "check_tokenizer"]
__all__ += ["load_source", "untracked"]

TOKENIZER_BATCH = 64

TrackRecords = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Shows the progress through so many records; called with the number of records just done."""


@contextmanager
def untracked(_total: int) -> Iterator[Callable[[int], None]]:
    """Show no progress."""
    yield lambda amount: None


@dataclass(frozen=True)
class SourceTokens:
    """Hold the examples of one source.

    Attributes:
        tokens: all of its data.
        kept: which examples of it, and how much of each.
        notes: what the user should know of where they are kept, a sentence each.
    """

    tokens: StoredTokens
    kept: KeptExamples
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tokenizing:
    """Say how records become tokens.

    Attributes:
        tokenizer: may be None for data that is already tokenized.
        today: the day that a chat template which asks for the date is told.
        limit: tokens of an example; longer ones are cut.
        part: what of a dataset is read.
        track: shows the progress.
    """

    tokenizer: "PreTrainedTokenizerBase | None"
    today: date
    limit: int
    part: DatasetPart
    track: TrackRecords = untracked


def check_tokenizer(data_path: str, data_format: DataFormat, tokenizer: object | None) -> None:
    """Refuse text for a model without a tokenizer.

    Raises:
        DataError: naming the source.
    """
    if data_format.needs_tokenizer and tokenizer is None:
        raise DataError(
            f"data_path {data_path} holds text ({data_format.name}), but the model has no "
            "tokenizer",
            parameters=("data_path",),
        )


def load_source(data_path: str, how: Tokenizing, launch: LaunchEnvironment) -> SourceTokens:
    """Read, check and tokenize a source, in its order.

    **Collective:** every rank must call; while the first of each machine tokenizes, the others
    wait.

    Raises:
        DataError: on every rank: the source or a record is unusable, or no example is left.
    """
    prepare = partial(_prepare, data_path, how)
    host = socket.gethostname()
    prepared = gather_from_all_ranks(lambda: (host, prepare() if launch.local_rank == 0 else None))
    near = [tokens for name, tokens in prepared[: launch.rank + 1] if tokens and name == host]
    seen = near[-1] if near and near[-1].folder.is_dir() else None
    # A container a rank, or another order of ranks: this rank is on its own.
    own = raise_on_all_ranks(lambda: seen or prepare())
    try:
        return raise_on_all_ranks(lambda: _open(own, data_path, how.limit))
    finally:
        if launch.local_rank == 0 or seen is None:
            own.release()


def _open(prepared: PreparedTokens, data_path: str, limit: int) -> SourceTokens:
    try:
        tokens = StoredTokens.open(prepared.folder)
    except OSError as error:
        raise DataError(
            f"the tokens of data_path {data_path} cannot be read from {prepared.folder} "
            f"({error.strerror or error})",
            parameters=("data_path",),
        ) from error
    kept = read_cut(prepared.folder, limit) or cut_examples(tokens, limit)
    if not len(kept.starts):
        raise DataError(
            f"data_path {data_path} leaves nothing to learn: none of its "
            f"{len(tokens.ends)} examples has a label within max_seq_length {limit} tokens",
            parameters=("data_path", "max_seq_length"),
        )
    return SourceTokens(tokens, kept, prepared.notes)


def _prepare(data_path: str, how: Tokenizing) -> PreparedTokens:
    """Tokenize the data, or find its tokens, and cut them to the limit."""
    source = _Source(data_path, how.part)
    key = token_key(source.digest, how.tokenizer, how.today)
    prepared = prepare_tokens(key, partial(_write_tokens, source, how))
    folder, limit = prepared.folder, how.limit
    # Where another user's cache cannot be written, every rank cuts for itself.
    with suppress(OSError):
        if read_cut(folder, limit) is None:
            write_cut(cut_examples(StoredTokens.open(folder), limit), folder, limit)
    return prepared


class _Source:
    """A data set, of which no more than a batch of records is held, and the checksum of it.

    Args:
        data_path: a file or a dataset.
        part: what of a dataset is read.
    """

    def __init__(self, data_path: str, part: DatasetPart) -> None:
        self.data_path = data_path
        self.part = part
        self._state: FileState | None = None
        try:
            self.digest, self._state = digest_file(Path(data_path))
        except (OSError, ValueError):  # no file; `read_records` knows what to say of others
            self.digest = digest_records(read_records(data_path, part))

    def check_unchanged(self) -> None:
        """Raise DataError if its file has changed since its checksum was taken."""
        if self._state is not None and file_state(Path(self.data_path)) != self._state:
            raise DataError(
                f"data_path {self.data_path} was changed while it was read; start again when it is "
                "complete",
                parameters=("data_path",),
            )


def _write_tokens(source: _Source, how: Tokenizing, writer: TokenWriter) -> dict[str, Any]:
    """Check all records, then tokenize them: so a bad one is told at once."""
    checked = check_records(read_records(source.data_path, source.part))
    check_tokenizer(source.data_path, checked.data_format, how.tokenizer)
    records = read_records(source.data_path, source.part)
    with date_written_out(how.tokenizer, how.today), how.track(checked.num_records) as advance:
        while batch := list(islice(records, TOKENIZER_BATCH)):
            writer.append(checked.data_format.encode(batch, how.tokenizer))
            advance(len(batch))
    source.check_unchanged()
    return {
        "format_name": checked.data_format.name,
        "ignored_keys": checked.ignored_keys,
        "template_date": how.today.isoformat() if writes_date(how.tokenizer) else None,
    }
