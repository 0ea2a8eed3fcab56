"""Examples that are tokenized while they are trained on, for data that does not fit on disk.

Rank 0 reads and tokenizes; every rank gets each global batch and takes its part of it. What has
been read is a place in the data (`StreamPosition`), which a checkpoint keeps: a resumed run goes
through the records before it without tokenizing them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import groupby, islice
from typing import TYPE_CHECKING

import numpy as np

from megablocks_utils.errors import DataError
from megablocks_utils.processes.agreement import broadcast_from_rank0
from megablocks_utils.training.data.cut import cut_examples
from megablocks_utils.training.data.examples import TokenizedExamples
from megablocks_utils.training.data.formats import check_records
from megablocks_utils.training.data.source_tokens import (
    TOKENIZER_BATCH,
    SourceTokens,
    Tokenizing,
    check_tokenizer,
)
from megablocks_utils.training.data.sources import check_part
from megablocks_utils.training.data.stream_records import SourceRecord, read_pass
from megablocks_utils.training.data.template_date import date_written_out, writes_date
from megablocks_utils.training.data.text import IGNORED_LABEL, Encoded
from megablocks_utils.training.data.token_files import StoredTokens
from megablocks_utils.training.data.training_templates import ChosenTemplate

if TYPE_CHECKING:
    from megablocks_utils.config import DataConfig

__all__ = ["ExampleStream", "StreamPosition", "StreamReader", "tokens_in_memory"]

HEAD_RECORDS = 512
"""Records that stand for all: for what must be known of the data before it is read."""


@dataclass(frozen=True)
class StreamPosition:
    """Say how far the data is read.

    Attributes:
        epoch: passes over it that are over.
        records: of this pass that are done.
        examples: that are done of the records which follow.
    """

    epoch: int = 0
    records: int = 0
    examples: int = 0

    def as_record(self) -> dict[str, int]:
        """Return it as a manifest holds it."""
        return asdict(self)


@dataclass(frozen=True)
class ExampleStream:
    """Read and tokenize the sources of a run, from any position.

    Attributes:
        config: which sources, and in which order.
        seed: of the order.
        how: records become tokens.
        template: the chat template that they are written with.
        vocab_size: of the model.
    """

    config: "DataConfig"
    seed: int
    how: Tokenizing
    template: ChosenTemplate
    vocab_size: int

    def read_head(self) -> TokenizedExamples:
        """Return the examples of the first records, in their order.

        Raises:
            DataError: they cannot be used, or none of them has anything to learn.
        """
        config = self.config
        check_part(config.data_path, self.how.part)
        whole = replace(config, shuffle=False)
        head = list(islice(self._records(whole, StreamPosition()), HEAD_RECORDS))
        encoded, ignored = self._encode(head)
        contents = {
            "format_name": "; ".join(dict.fromkeys(found.name for _, found, _ in head)),
            "ignored_keys": ignored,
            "template_date": self.how.today.isoformat() if self._writes_date() else None,
        }
        examples = tokens_in_memory(encoded, self.how.limit, contents)
        if not len(examples):
            raise DataError(
                f"data_path {' '.join(config.data_path)} leaves nothing to learn: none of its "
                f"first {len(head)} records has a label within max_seq_length {self.how.limit} "
                "tokens",
                parameters=("data_path", "max_seq_length"),
            )
        examples.check_vocabulary(self.vocab_size)
        return examples

    def batches(
        self, size: int, position: StreamPosition
    ) -> Iterator[tuple[TokenizedExamples, StreamPosition]]:
        """Yield global batches without end, and the position after each.

        The last one of a pass over the data may be smaller.

        Raises:
            DataError: a record cannot be used, or a pass has given nothing to learn.
        """
        is_fresh = position == StreamPosition(position.epoch)
        while True:
            batch: list[Encoded] = []
            for example, place in self._examples(position):
                batch.append(example)
                is_fresh = False
                if len(batch) == size:
                    yield self._pack(batch), place
                    batch = []
            position = StreamPosition(position.epoch + 1)
            if batch:
                yield self._pack(batch), position
            elif is_fresh:
                raise DataError(
                    f"data_path {' '.join(self.config.data_path)} leaves nothing to learn",
                    parameters=("data_path",),
                )
            is_fresh = True

    def _pack(self, batch: list[Encoded]) -> TokenizedExamples:
        examples = tokens_in_memory(batch, self.how.limit)
        examples.check_vocabulary(self.vocab_size)
        return examples

    def _examples(self, position: StreamPosition) -> Iterator[tuple[Encoded, StreamPosition]]:
        """Yield the rest of a pass, and the position after each example."""
        records, done = self._records(self.config, position), position.records
        skip = position.examples
        while chunk := list(islice(records, TOKENIZER_BATCH)):
            kept = tokens_in_memory(self._encode(chunk)[0], self.how.limit)
            for number in range(skip, len(kept)):
                ids, labels = kept[number]
                place = StreamPosition(position.epoch, done, number + 1)
                yield (ids.tolist(), labels.tolist()), place
            done, skip = done + len(chunk), 0

    def _records(self, config: "DataConfig", position: StreamPosition) -> Iterator[SourceRecord]:
        return read_pass(
            config.data_path,
            self.how.part,
            config.data_weights,
            seed=self.seed,
            epoch=position.epoch,
            block_size=config.shuffle_buffer_size if config.shuffle else 1,
            skip=position.records,
        )

    def _encode(self, records: list[SourceRecord]) -> tuple[list[Encoded], tuple[str, ...]]:
        """Check and tokenize records; return them and the keys that are ignored."""
        encoded: list[Encoded] = []
        ignored: dict[str, None] = {}
        tokenizer = self.how.tokenizer
        with self.template.in_use(), date_written_out(tokenizer, self.how.today):
            for path, group in groupby(records, key=lambda item: item[0]):
                found = list(group)
                data_format, alike = found[0][1], [record for _, _, record in found]
                check_tokenizer(path, data_format, tokenizer)
                checked = check_records(alike, data_format)
                ignored |= dict.fromkeys(checked.ignored_keys)
                encoded += data_format.encode(alike, tokenizer)
        return encoded, tuple(ignored)

    def _writes_date(self) -> bool:
        with self.template.in_use():
            return writes_date(self.how.tokenizer)


class StreamReader:
    """Give every rank the global batches of a stream, one after the other.

    Args:
        stream: read by rank 0 alone.
        size: examples of a global batch.
        step: optimizer steps that are done.
        position: after these.
    """

    _KEPT = 16  # steps whose positions are known: Trainer fetches one ahead

    def __init__(
        self, stream: ExampleStream, size: int, step: int, position: StreamPosition
    ) -> None:
        self._batches = stream.batches(size, position)
        self._positions = {step: position}
        self._step = step

    def next_batch(self) -> TokenizedExamples:
        """Return the examples of the next step.

        **Collective:** one broadcast of the global batch over the world.

        Raises:
            DataError: on every rank: a record cannot be used.
        """
        batch, position = broadcast_from_rank0(lambda: next(self._batches))
        self._step += 1
        self._positions[self._step] = position
        self._positions.pop(self._step - self._KEPT, None)
        return batch

    def position_after(self, step: int) -> StreamPosition:
        """Return how far the data was read after one of the last steps."""
        return self._positions[step]


def tokens_in_memory(
    encoded: list[Encoded], limit: int, contents: Mapping[str, object] | None = None
) -> TokenizedExamples:
    """Return examples, cut to a limit; those left with nothing to learn are dropped."""
    lengths = np.array([len(ids) for ids, _ in encoded], dtype=np.int64)
    ends = np.cumsum(lengths)
    input_ids = np.array([token for ids, _ in encoded for token in ids], dtype=np.int32)
    labels = np.array([label for _, own in encoded for label in own], dtype=np.int32)
    labels[(ends - lengths)[lengths > 0]] = IGNORED_LABEL
    facts = contents or {"format_name": "", "ignored_keys": (), "template_date": None}
    tokens = StoredTokens(input_ids, None, labels, ends, facts)
    return TokenizedExamples([SourceTokens(tokens, cut_examples(tokens, limit))])
