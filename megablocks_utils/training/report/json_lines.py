"""Files of JSON lines that grow while a run trains, and that a resumed run continues."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megablocks_utils.files import finite_or_none, publish_file

__all__ = ["JsonLinesWriter"]


class JsonLinesWriter:
    """Write lines that are on disk as soon as they are known. Rank 0 only.

    Args:
        path: The file. What an earlier run left there is dropped.
        after: The file of the steps done before, whose copy is continued.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: str | Path, *, after: str | Path | None = None) -> None:
        path = Path(path)
        done = b"" if after is None else Path(after).read_bytes()
        with publish_file(path) as temporary:
            temporary.write_bytes(done)
        self._file = path.open("a", encoding="utf-8")

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append a line for each record; a number that is not finite becomes null.

        Raises:
            OSError: The file cannot be written.
        """
        lines = [json.dumps(finite_or_none(record), allow_nan=False) for record in records]
        self._file.write("".join(f"{line}\n" for line in lines))
        self._file.flush()

    def close(self) -> None:
        """Close the file; every line that could be written is in it."""
        with suppress(OSError):  # of a line that `append` has failed on: closing tries it again
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
