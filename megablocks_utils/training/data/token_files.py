"""Tokens of a data set in flat files: written once, a batch at a time, and mapped by every rank.

A folder holds the ids of all examples one after the other, which of them are learned, where each
example ends, and a JSON file that says how large each file must be and its checksum. What it costs
is 5 bytes a token, once a machine: mapped pages are shared by its processes. Labels that are no
copy of their token (only records that are tokenized already can have such) cost 4 bytes, not 1.

These are plain arrays and not an Arrow table of `datasets`: an example, and a packed row of some,
is a slice of them, and what belongs to them (checksums, what was said of the records) stands beside
them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megablocks_utils.checkpoint.manifest import describe_file
from megablocks_utils.files import write_json_atomically
from megablocks_utils.training.data.text import IGNORED_LABEL, Encoded

__all__ = ["BLOCK_TOKENS", "TOKEN_LIMIT", "StoredTokens", "TokenWriter", "digest_json", "is_intact"]

TOKEN_LIMIT = 2**31
"""Token ids must be below: they are stored in four bytes."""

BLOCK_TOKENS = 2**20
"""Tokens looked at together where all of them are read."""

_IDS, _LABELS, _LEARNED, _ENDS = "input_ids.int32", "labels.int32", "learned.bool", "ends.int64"
_CONTENTS = "tokens.json"


@dataclass(frozen=True)
class StoredTokens:
    """Hold all examples, uncut, one after the other.

    The label of an example's first token is always -100: nothing stands before it to predict it
    from, and in a packed row the example before must not.

    Attributes:
        input_ids: (tokens,) int32.
        learned: (tokens,) bool: whether a token's label is the token itself, or else -100; None
            where there are other labels.
        labels: (tokens,) int32; None where `learned` says them.
        ends: (examples,) int64: where each example ends; the next starts there.
        contents: what the JSON file says.
    """

    input_ids: np.ndarray
    learned: np.ndarray | None
    labels: np.ndarray | None
    ends: np.ndarray
    contents: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "StoredTokens":
        """Map the files of a folder that `TokenWriter` has finished.

        Raises:
            OSError: they cannot be read.
        """
        contents = _read_contents(folder)
        arrays = {name: _map_file(folder / name) for name in contents["files"]}
        return cls(
            input_ids=arrays[_IDS],
            learned=arrays.get(_LEARNED),
            labels=arrays.get(_LABELS),
            ends=arrays[_ENDS],
            contents=contents,
        )

    def labels_of(self, place: slice) -> np.ndarray:
        """Return the labels of a stretch of tokens, int32."""
        if self.labels is not None:
            return self.labels[place]
        assert self.learned is not None
        return np.where(self.learned[place], self.input_ids[place], np.int32(IGNORED_LABEL))

    def learned_mask(self) -> np.ndarray:
        """Return which tokens are learned, (tokens,) bool."""
        if self.learned is not None:
            return self.learned
        assert self.labels is not None
        return self.labels != IGNORED_LABEL


class TokenWriter:
    """Write the files of `StoredTokens` into an empty folder, a batch of examples at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._end = 0

    def append(self, encoded: Sequence[Encoded]) -> None:
        """Add examples.

        Raises:
            OSError: the files cannot be written.
        """
        lengths = np.array([len(ids) for ids, _ in encoded], dtype=np.int64)
        ends = np.cumsum(lengths)
        input_ids = _flatten([ids for ids, _ in encoded])
        labels = _flatten([labels for _, labels in encoded])
        labels[(ends - lengths)[lengths > 0]] = IGNORED_LABEL
        for name, array in ((_IDS, input_ids), (_LABELS, labels), (_ENDS, ends + self._end)):
            with (self._folder / name).open("ab") as file:
                file.write(array.data)
        self._end += len(input_ids)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Keep the labels in their shortest form, and write the file that makes the rest valid.

        Args:
            facts: what the JSON file says beside the files.

        Raises:
            OSError: the files cannot be written.
        """
        self._shorten_labels()
        paths = [self._folder / name for name in (_IDS, _LABELS, _LEARNED, _ENDS)]
        files = {path.name: describe_file(path) for path in paths if path.exists()}
        contents = {**facts, "files": files}
        checksum = {"sha256": digest_json(contents)}
        write_json_atomically(self._folder / _CONTENTS, contents | checksum)

    def _shorten_labels(self) -> None:
        """Replace the labels by a byte for each, where every label is its token or -100."""
        input_ids, labels = (_map_file(self._folder / name) for name in (_IDS, _LABELS))
        with (self._folder / _LEARNED).open("wb") as file:
            for place in _blocks(0, len(labels)):
                learned = labels[place] != IGNORED_LABEL
                if not np.array_equal(labels[place][learned], input_ids[place][learned]):
                    break
                file.write(learned.data)
            else:
                (self._folder / _LABELS).unlink()
                return
        (self._folder / _LEARNED).unlink()


def is_intact(folder: Path) -> bool:
    """Say whether a folder holds finished files with the checksums they were written with."""
    try:
        contents = _read_contents(folder)
        checksum = contents.pop("sha256")
        files = contents["files"].items()
        return checksum == digest_json(contents) and all(
            describe_file(folder / name) == wanted for name, wanted in files
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def digest_json(value: Any) -> str:
    """Return the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_contents(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _CONTENTS).read_text(encoding="utf-8"))


def _flatten(parts: Sequence[Sequence[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(parts), dtype=np.int32)


def _map_file(path: Path) -> np.ndarray:
    """Map a file of numbers whose dtype is its suffix; read it where mapping is not possible."""
    dtype = np.dtype(path.suffix.removeprefix("."))
    if not path.stat().st_size:
        return np.empty(0, dtype)
    try:
        return np.memmap(path, dtype, mode="r")
    except OSError:  # a mount without mmap
        return np.fromfile(path, dtype)


def _blocks(start: int, stop: int) -> Iterator[slice]:
    for first in range(start, stop, BLOCK_TOKENS):
        yield slice(first, min(first + BLOCK_TOKENS, stop))
