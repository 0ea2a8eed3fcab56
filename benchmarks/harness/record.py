"""The JSON file of a benchmark: its provenance and rows, complete after every measurement."""

import json
from pathlib import Path
from typing import Any

from megablocks_utils.files import write_json_atomically

Row = dict[str, Any]


class Record:
    """What is measured so far; one process writes at a time.

    Args:
        path: of the file; None: nothing is written.
        content: provenance, and whatever else the file holds beside `rows`.
    """

    def __init__(self, path: Path | None, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read a file that a record wrote."""
        return cls(path, json.loads(path.read_text(encoding="utf-8")))

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return self.content.setdefault("rows", [])

    def find(self, **wanted: Any) -> Row | None:
        """Return the row with these values; None if there is none."""
        return next((row for row in self.rows if _matches(row, wanted)), None)

    def add(self, row: Row, *keys: str) -> None:
        """Add a row and write the file.

        Args:
            row: to be added.
            keys: it replaces a row whose values of all these keys are the same.
        """
        same = self.find(**{key: row[key] for key in keys}) if keys else None
        if same is None:
            self.rows.append(row)
        else:
            self.rows[self.rows.index(same)] = row
        self.write()

    def write(self) -> None:
        """Write the file, complete or not at all."""
        if self.path is not None:
            write_json_atomically(self.path, self.content)


def _matches(row: Row, wanted: Row) -> bool:
    return all(row[key] == value for key, value in wanted.items())
