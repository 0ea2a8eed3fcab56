"""Cut examples to a limit, drop those left with nothing to learn, and sum up the rest.

The result is one small file beside the tokens, for every limit that was used.
"""

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from megablocks_utils.files import publish_file
from megablocks_utils.training.data.token_files import BLOCK_TOKENS, TOKEN_LIMIT, StoredTokens

__all__ = ["KeptExamples", "cut_examples", "read_cut", "write_cut"]


@dataclass(frozen=True)
class KeptExamples:
    """Say which examples are kept, and how much of each.

    Attributes:
        starts: (kept,) int64: where each starts among all tokens.
        lengths: (kept,) int32: tokens of each, after the cut.
        num_label_tokens: (kept,) int32: labels to learn of each, all at least 1.
        num_cut: examples that were longer than the limit.
        num_dropped: examples left out because no label was left to learn.
        largest_token: of the kept tokens and labels.
        checksum: SHA-256 of the kept examples in order: lengths, tokens, labels.
    """

    starts: np.ndarray
    lengths: np.ndarray
    num_label_tokens: np.ndarray
    num_cut: int
    num_dropped: int
    largest_token: int
    checksum: str


def cut_examples(tokens: StoredTokens, limit: int) -> KeptExamples:
    """Cut every example to `limit` tokens; examples without a label to learn are dropped."""
    starts = np.concatenate([[0], tokens.ends[:-1]]).astype(np.int64)[: len(tokens.ends)]
    uncut = tokens.ends - starts
    lengths = np.minimum(uncut, min(limit, TOKEN_LIMIT))
    learned = _reduce(np.add, tokens.learned_mask(), starts, lengths)
    kept = learned > 0
    starts, lengths = starts[kept], lengths[kept]
    largest = _reduce(np.maximum, tokens.input_ids, starts, lengths).max(initial=0)
    if tokens.labels is not None:
        largest = max(largest, _reduce(np.maximum, tokens.labels, starts, lengths).max(initial=0))
    return KeptExamples(
        starts=starts,
        lengths=lengths.astype(np.int32),
        num_label_tokens=learned[kept].astype(np.int32),
        num_cut=int((uncut > limit).sum()),
        num_dropped=int((~kept).sum()),
        largest_token=int(largest),
        checksum=_checksum(tokens, starts, lengths),
    )


def write_cut(kept: KeptExamples, folder: Path, limit: int) -> None:
    """Write the file of a limit, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    with publish_file(_path(folder, limit)) as temporary, temporary.open("wb") as file:
        np.savez(file, **asdict(kept))


def read_cut(folder: Path, limit: int) -> KeptExamples | None:
    """Read the file of a limit; None where there is none, or a damaged one."""
    try:
        with _path(folder, limit).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {field.name: stored[field.name] for field in fields(KeptExamples)}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return KeptExamples(
        starts=arrays["starts"],
        lengths=arrays["lengths"],
        num_label_tokens=arrays["num_label_tokens"],
        num_cut=int(arrays["num_cut"]),
        num_dropped=int(arrays["num_dropped"]),
        largest_token=int(arrays["largest_token"]),
        checksum=str(arrays["checksum"]),
    )


def _path(folder: Path, limit: int) -> Path:
    return folder / f"cut-{limit}.npz"


def _reduce(
    operation: np.ufunc, values: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Return the sum or maximum of each example's values, int64; 0 for an empty example."""
    results = np.zeros(len(starts), dtype=np.int64)
    filled = lengths > 0
    places = np.column_stack([starts[filled], (starts + lengths)[filled]]).ravel()
    if not len(places):
        return results
    # The last example may end where no value is, and reduceat goes to the end by itself.
    inside = places[:-1] if places[-1] == len(values) else places
    results[filled] = operation.reduceat(values, inside, dtype=np.int64)[::2]
    return results


def _checksum(tokens: StoredTokens, starts: np.ndarray, lengths: np.ndarray) -> str:
    digest = hashlib.sha256(lengths.astype("<i8").data)
    for place in _stretches(starts, starts + lengths):
        digest.update(tokens.input_ids[place].astype("<i8").data)
    for place in _stretches(starts, starts + lengths):
        digest.update(tokens.labels_of(place).astype("<i8").data)
    return digest.hexdigest()


def _stretches(starts: np.ndarray, stops: np.ndarray) -> Iterator[slice]:
    """Yield the examples in order, neighbours together, in pieces of a bounded size."""
    if not len(starts):
        return
    gaps = np.flatnonzero(starts[1:] != stops[:-1])
    firsts = starts[np.concatenate([[0], gaps + 1])]
    lasts = stops[np.concatenate([gaps, [len(stops) - 1]])]
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        for start in range(first, last, BLOCK_TOKENS):
            yield slice(start, min(start + BLOCK_TOKENS, last))
