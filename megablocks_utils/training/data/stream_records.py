"""The records of a pass over data that is read while it is trained on, in order."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TypeVar

import numpy as np

from megablocks_utils.training.data.example_order import permute
from megablocks_utils.training.data.formats import DataFormat, find_format
from megablocks_utils.training.data.sources import DatasetPart, Record, read_records

__all__ = ["SourceRecord", "merge_in_shares", "read_pass"]

SourceRecord = tuple[str, DataFormat, Record]
"""The source of a record, the format of its first record, and the record."""
_DRAWS = 1000  # that `datasets` makes at a time
_Item = TypeVar("_Item")


def read_pass(
    data_paths: Sequence[str],
    part: DatasetPart,
    weights: Sequence[float] | None,
    *,
    seed: int,
    epoch: int,
    block_size: int,
    skip: int = 0,
) -> Iterator[SourceRecord]:
    """Yield the records of an epoch: a function of seed and epoch alone.

    Args:
        data_paths: the sources, one after the other.
        part: what of a dataset is read.
        weights: shares in which is drawn from them until the first is used up; None: all of each.
        seed: of the order and of the draws.
        epoch: counted from 0.
        block_size: records that are shuffled among each other; 1: none.
        skip: records of the epoch that are left out.

    Raises:
        DataError: a source cannot be read, or its first record has no known format.
    """
    sources = [_read_source(path, part) for path in data_paths]
    records = chain(*sources) if weights is None else merge_in_shares(sources, weights, seed)
    block, behind = divmod(skip, block_size)
    records = islice(records, block * block_size, None)
    while items := list(islice(records, block_size)):
        order = permute(len(items), seed, epoch, block) if block_size > 1 else range(len(items))
        yield from (items[i] for i in order[behind:])
        block, behind = block + 1, 0


def merge_in_shares(
    sources: Sequence[Iterator[_Item]], weights: Sequence[float], seed: int
) -> Iterator[_Item]:
    """Draw from sources until one is used up, as `datasets.interleave_datasets` does.

    Args:
        sources: of unknown length.
        weights: only their ratios matter.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    shares = np.array(weights) / sum(weights)
    following = [next(source, None) for source in sources]
    while True:
        for drawn in generator.choice(len(sources), size=_DRAWS, p=shares).tolist():
            item = following[drawn]
            if item is None:
                return
            following[drawn] = next(sources[drawn], None)
            yield item
            if following[drawn] is None:
                return


def _read_source(data_path: str, part: DatasetPart) -> Iterator[SourceRecord]:
    data_format: DataFormat | None = None
    for record in read_records(data_path, part):
        data_format = data_format or find_format(record)
        yield data_path, data_format, record
