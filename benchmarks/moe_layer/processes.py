"""Measure every side in a process of its own, one after the other, within a budget of time.

A fresh process for each side: compiled kernels, cached choices and memory of one side do not help
or harm another, and a kernel that breaks the device breaks its own process only.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.harness.device_timing import measure_machine
from benchmarks.harness.record import Record
from benchmarks.moe_layer.cases import Case, has_words
from benchmarks.moe_layer.measure import FAILED, NOT_REACHED, Effort, measure_case

ROOT = Path(__file__).resolve().parents[2]
CRASHES_ALLOWED = 3
BEGUN = "cut off while it was measured"
GRACE_S = 60.0
_SHARE = 2.0


@dataclass(frozen=True)
class Selection:
    """What to measure: cases in order, sides in order, and words that labels must hold."""

    cases: tuple[Case, ...]
    sides: tuple[str, ...]
    words: str = ""

    def of(self, side: str) -> list[Case]:
        """Return the cases of a side."""
        return [case for case in self.cases if has_words(f"{side}, {case.label()}", self.words)]

    def passes(self) -> list["Selection"]:
        """Split by the first routing and the others: a complete first table comes first."""
        first = self.cases[0].routing if self.cases else ""
        parts = [
            tuple(case for case in self.cases if (case.routing == first) == is_first)
            for is_first in (True, False)
        ]
        return [Selection(part, self.sides, self.words) for part in parts if part]


def run_sides(record: Record, selection: Selection, command: Sequence[str], end: float) -> None:
    """Measure all sides, each in new processes, and note what the time did not suffice for.

    Args:
        record: that the processes write to.
        selection: what to measure.
        command: of a process, without the name of its work and its deadline.
        end: when to be done, as `time.time` counts.
    """
    for part in selection.passes():
        for place, side in enumerate(part.sides):
            share = _SHARE * (end - time.time()) / (len(part.sides) - place)
            _run_side(record.path, part, side, command, min(end, time.time() + share))
    record = Record.read(record.path)
    for side in selection.sides:
        for case in selection.of(side):
            if record.find(side, case) is None:
                record.add(_row(side, case, NOT_REACHED, "the time was used up before it"))


def work(
    record: Record,
    cases: Sequence[Case],
    side: str,
    *,
    deadline: float,
    device: torch.device,
    effort: Effort,
) -> None:
    """Do the work of one process: the open cases of a side, and first the rates of the machine."""
    # Products in fp32 are the truth here, and fp32 sides are fp32.
    torch.set_float32_matmul_precision("highest")
    if "machine" not in record.content:
        record.machine = measure_machine(device)
    console = Console()
    for case in cases:
        if record.is_settled(side, case):
            continue
        if time.time() > deadline:
            return
        record.add(_row(side, case, NOT_REACHED, BEGUN))  # should this process not live to say more
        row = measure_case(side, case, record.machine, device, effort)
        record.add(row)
        text = f"{side}, {case.label()}: {_summary(row)}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _run_side(
    path: Path, selection: Selection, side: str, command: Sequence[str], deadline: float
) -> None:
    """Run processes of a side until its cases are done: a new one after each that breaks."""
    routings = dict.fromkeys(case.routing for case in selection.cases)
    words = [*command, "--routings", *routings, "--worker", side, "--deadline", str(deadline)]
    for crash in range(1, CRASHES_ALLOWED + 1):
        record = Record.read(path)
        is_done = all(record.is_settled(side, case) for case in selection.of(side))
        if is_done or time.time() > deadline:
            return
        reason = _run(words, deadline)
        if reason is None:
            return
        _blame(Record.read(path), selection.of(side), side, reason, crash == CRASHES_ALLOWED)


def _blame(
    record: Record, cases: Sequence[Case], side: str, reason: str, is_given_up: bool
) -> None:
    """Note a crash in the case that was begun, and in all open ones if the side is given up."""
    for case in cases:
        row = record.find(side, case) or {"status": NOT_REACHED, "reason": ""}
        is_open = row["status"] == NOT_REACHED
        if row["reason"] == BEGUN or (is_open and is_given_up):
            record.add(_row(side, case, FAILED, reason))


def _run(command: Sequence[str], deadline: float) -> str | None:
    """Run a process and return why it failed, in a line; None if it did not."""
    seconds = max(0.0, deadline - time.time()) + GRACE_S
    try:
        run = subprocess.run(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return "it did not answer in time and was ended"
    if run.returncode == 0:
        return None
    sys.stderr.write(run.stderr)
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    return f"exit code {run.returncode}: {lines[-1].strip() if lines else 'no message'}"


def _row(side: str, case: Case, status: str, reason: str) -> dict:
    return {"side": side, "case": case.describe(), "status": status, "reason": reason}


def _summary(row: dict) -> str:
    if "ms" not in row:
        return f"{row['status']}: {row['reason']}"
    forward, both = (row["ms"][phase]["median"] for phase in ("forward", "forward_backward"))
    return f"forward {forward:.2f} ms, with backward {both:.2f} ms"
