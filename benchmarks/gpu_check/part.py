"""A part of the check: its rows, its time, and where its programs write."""

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.gpu_check.options import TITLES, CheckOptions
from benchmarks.gpu_check.programs import Finished, FreshProcess, Program, Start, run_programs
from benchmarks.harness.case import has_words
from benchmarks.harness.device_timing import describe_device
from benchmarks.harness.outcome import (
    FAILED,
    LEFT_OUT,
    MEASURED,
    NOT_INSTALLED,
    NOT_REACHED,
    OOM,
    explain,
)
from benchmarks.harness.provenance import build_provenance
from benchmarks.harness.record import Record, Row
from benchmarks.harness.report import say, show
from megablocks_utils.kernels.device import read_device_facts

_MODULE = "benchmarks.gpu_check"
_MOST_JOBS = 8
_MODULES: Mapping[int, str] = MappingProxyType(
    {1: "gpu_tests", 2: "training_runs", 3: "tiles_and_layer", 4: "memory", 5: "steps"}
)

Read = Callable[[Finished], Row]
"""What a row has of a program that ended well; it may bring another status, and its reason."""


class WrongFigureError(Exception):
    """Report that a program ended well, but what it says is not within its bound."""

    def __init__(self, reason: str, figures: Mapping[str, Any]) -> None:
        super().__init__(reason)
        self.figures = figures


@dataclass(frozen=True)
class Part:
    """A part that runs.

    Attributes:
        options: of the command line.
        record: its JSON file.
        output: of its results.
        scratch: for models, data and what programs write; removed at the end.
        deadline: as `time.monotonic` counts.
        start: starts programs.
    """

    options: CheckOptions
    record: Record
    output: Path
    scratch: Path
    deadline: float
    start: Start

    @property
    def is_dry(self) -> bool:
        """Whether this only tries the part out, without a GPU."""
        return self.options.device == "cpu"

    @property
    def folder(self) -> Path:
        """Of what programs write, a folder for each row."""
        return self.scratch / "rows"

    @property
    def jobs(self) -> int:
        """Programs that may run at once, where nothing is timed."""
        return 1 if self.is_dry else max(1, min(_MOST_JOBS, (os.cpu_count() or 1) // 2))

    def run(self, programs: Sequence[Program], read: Read, *, jobs: int = 1) -> None:
        """Run programs, each a row.

        Args:
            programs: in their order.
            read: gives what a row has, when its program ended well.
            jobs: programs at once.
        """
        chosen = [one for one in programs if self.is_wanted(one.name)]
        for finished in self.each(chosen, jobs=jobs):
            self.add(build_row(finished, read))

    def each(
        self,
        programs: Sequence[Program],
        *,
        jobs: int = 1,
        on_poll: Callable[[], None] = lambda: None,
    ) -> Iterator[Finished]:
        """Run programs and yield how each ended."""
        return run_programs(
            programs, self.folder, self.deadline, start=self.start, jobs=jobs, on_poll=on_poll
        )

    def is_wanted(self, name: str) -> bool:
        """Say whether `--only` names a row."""
        return has_words(name, self.options.only)

    def add(self, row: Row) -> None:
        """Add a row, write the file, and say so."""
        self.record.add(row, "name")
        reason = f": {row['reason']}" if "reason" in row else ""
        say(f"{row['name']}: {row['status']}{reason}")

    def finish(self) -> bool:
        """Count the rows by status, show the counts, and say whether a row failed."""
        counts = {
            status: sum(row["status"] == status for row in self.record.rows)
            for status in (MEASURED, FAILED, OOM, NOT_REACHED, NOT_INSTALLED, LEFT_OUT)
        }
        self.record.content["counts"] = counts
        self.record.write()
        line = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        show(f"part {self.options.part}: {line or 'no rows'}; written to {self.record.path}")
        return counts[FAILED] + counts[OOM] > 0


def build_row(finished: Finished, read: Read) -> Row:
    """Return the row of a program: what it found, or why there is nothing."""
    row: Row = {"name": finished.program.name, "seconds": round(finished.seconds, 1)}
    if finished.ending is None:
        return row | {"status": NOT_REACHED, "reason": _say_not_reached(finished)}
    if finished.ending.exit_code != 0:
        return row | explain(finished.ending) | {"log": finished.log()}
    try:
        return row | {"status": MEASURED} | read(finished)
    except WrongFigureError as error:
        return row | {"status": FAILED, "reason": str(error)} | dict(error.figures)
    except (OSError, ValueError, LookupError) as error:
        reason = f"its results cannot be read: {type(error).__name__}: {error}"
        return row | {"status": FAILED, "reason": reason}


def run_part(part: Part) -> None:
    """Run the rows of a part; what another part needs is not imported."""
    module = importlib.import_module(f"benchmarks.gpu_check.{_MODULES[part.options.part]}")
    module.run(part)


@contextmanager
def open_part(options: CheckOptions, argv: Sequence[str], start: Start | None) -> Iterator[Part]:
    """Start a part: its folders, its file with provenance and versions, its time."""
    deadline = time.monotonic() + 60 * options.minutes
    output = Path(options.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    provenance = build_provenance(
        _MODULE,
        argv,
        part=options.part,
        title=TITLES[options.part],
        device=describe_device(device),
        is_dry_run=options.device == "cpu",
    )
    provenance["versions"]["triton"] = read_device_facts(options.device).triton_version
    record = Record(output / f"part{options.part}.json", provenance | {"rows": []})
    record.write()
    versions = ", ".join(f"{name} {found}" for name, found in provenance["versions"].items())
    where = provenance["device"]["name"]
    say(f"part {options.part}: {TITLES[options.part]}; on {where}; {versions}")
    with tempfile.TemporaryDirectory() as scratch:
        yield Part(
            options,
            record,
            output,
            Path(scratch),
            deadline,
            start or FreshProcess,
        )


def _say_not_reached(finished: Finished) -> str:
    if finished.seconds:
        return f"it had run {finished.seconds:.0f} s when the part's time was used up"
    return "the part's time was used up before it"
