"""The file of the layer benchmark: a certificate and rows, complete after every measurement."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.moe_layer.cases import Case
from benchmarks.moe_layer.floor import Machine
from benchmarks.moe_layer.measure import NOT_REACHED, SKIPPED
from megablocks_utils.files import write_json_atomically


class Record:
    """What is measured so far; one process writes at a time."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        """Take what the file holds, or shall hold."""
        self.path, self.content = path, content

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read a file that a record wrote."""
        return cls(path, json.loads(path.read_text(encoding="utf-8")))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, oldest first."""
        return self.content["rows"]

    @property
    def machine(self) -> Machine:
        """Return the rates of the machine, as measured."""
        return Machine(**self.content["machine"])

    @machine.setter
    def machine(self, machine: Machine) -> None:
        self.content["machine"] = asdict(machine)
        self.write()

    def find(self, side: str, case: Case) -> dict[str, Any] | None:
        """Return the row of a side and a case."""
        wanted = (side, case.describe())
        return next((row for row in self.rows if (row["side"], row["case"]) == wanted), None)

    def is_settled(self, side: str, case: Case) -> bool:
        """Say whether a case needs no measurement; what was skipped is tried again."""
        row = self.find(side, case)
        return row is not None and row["status"] not in (NOT_REACHED, SKIPPED)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, in the place of one of the same side and case, and write the file."""
        same = (row["side"], row["case"])
        others = [other for other in self.rows if (other["side"], other["case"]) != same]
        self.content["rows"] = [*others, row]
        self.write()

    def append(self, row: dict[str, Any]) -> None:
        """Add a row and write the file."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write the file, complete or not at all."""
        write_json_atomically(self.path, self.content)
