"""Measure every contender in a process of its own, one after the other, within a time limit.

A fresh process for each: compiled kernels, cached choices and memory of one contender do not help
or harm another, and a kernel that breaks the device breaks its own process only.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.harness.case import has_words
from benchmarks.harness.device_timing import Machine, measure_machine
from benchmarks.harness.outcome import FAILED, NOT_REACHED, Ending
from benchmarks.harness.provenance import ROOT
from benchmarks.harness.record import Record, Row
from benchmarks.harness.report import show
from benchmarks.moe_layer.cases import Case
from benchmarks.moe_layer.measure import SKIPPED, Effort, measure_case

CRASHES_ALLOWED = 3
STARTED = "interrupted while it was measured"
GRACE_S = 60.0
_SHARE = 2.0


@dataclass(frozen=True)
class Selection:
    """What to measure: cases and contenders in order, and words that labels must hold."""

    cases: tuple[Case, ...]
    contenders: tuple[str, ...]
    words: str = ""

    def of(self, name: str) -> list[Case]:
        """Return the cases of a contender."""
        return [case for case in self.cases if has_words(f"{name}, {case.label()}", self.words)]

    def passes(self) -> list["Selection"]:
        """Split into the first routing and the others: the first table is completed first."""
        first = self.cases[0].routing if self.cases else ""
        parts = [
            tuple(case for case in self.cases if (case.routing == first) == is_first)
            for is_first in (True, False)
        ]
        return [Selection(part, self.contenders, self.words) for part in parts if part]


def run_contenders(path: Path, selection: Selection, command: Sequence[str], end: float) -> None:
    """Measure all contenders, each in new processes, and record what the time was too short for.

    Args:
        path: of the record that the processes write to.
        selection: what to measure.
        command: of a process, without its contender and its deadline.
        end: when to be done, as `time.time` counts.
    """
    for part in selection.passes():
        for place, name in enumerate(part.contenders):
            share = _SHARE * (end - time.time()) / (len(part.contenders) - place)
            _run_contender(path, part, name, command, min(end, time.time() + share))
    record = Record.read(path)
    for name in selection.contenders:
        for case in selection.of(name):
            if find_row(record, name, case) is None:
                add_row(record, _row(name, case, NOT_REACHED, "the time was used up before it"))


def work(
    record: Record,
    cases: Sequence[Case],
    name: str,
    *,
    deadline: float,
    device: torch.device,
    effort: Effort,
) -> None:
    """Do the work of one process: the open cases of a contender, after the rates of the machine."""
    # Products in fp32 are the reference here, and fp32 contenders are fp32.
    torch.set_float32_matmul_precision("highest")
    if "machine" not in record.content:
        record.content["machine"] = asdict(measure_machine(device))
        record.write()
    machine = Machine(**record.content["machine"])
    for case in cases:
        if is_settled(record, name, case):
            continue
        if time.time() > deadline:
            return
        # In case this process does not live to say more.
        add_row(record, _row(name, case, NOT_REACHED, STARTED))
        row = measure_case(name, case, machine, device, effort)
        add_row(record, row)
        show(f"{name}, {case.label()}: {_summary(row)}")


def find_row(record: Record, name: str, case: Case) -> Row | None:
    """Return the row of a contender and a case."""
    return record.find(side=name, case=case.describe())


def is_settled(record: Record, name: str, case: Case) -> bool:
    """Say whether a case needs no measurement; what was skipped is tried again."""
    row = find_row(record, name, case)
    return row is not None and row["status"] not in (NOT_REACHED, SKIPPED)


def add_row(record: Record, row: Row) -> None:
    """Add a row in place of one of the same contender and case."""
    record.add(row, "side", "case")


def _run_contender(
    path: Path, selection: Selection, name: str, command: Sequence[str], deadline: float
) -> None:
    """Run processes of a contender until its cases are done: a new one after each that breaks."""
    routings = dict.fromkeys(case.routing for case in selection.cases)
    words = [*command, "--routings", *routings, "--worker", name, "--deadline", str(deadline)]
    for crash in range(1, CRASHES_ALLOWED + 1):
        record = Record.read(path)
        is_done = all(is_settled(record, name, case) for case in selection.of(name))
        if is_done or time.time() > deadline:
            return
        reason = _run(words, deadline)
        if reason is None:
            return
        record = Record.read(path)
        _record_crash(
            record, selection.of(name), name, reason, is_given_up=crash == CRASHES_ALLOWED
        )


def _record_crash(
    record: Record, cases: Sequence[Case], name: str, reason: str, *, is_given_up: bool
) -> None:
    """Record a crash in the case that was started; in all open ones if no process follows."""
    for case in cases:
        row = find_row(record, name, case) or {"status": NOT_REACHED, "reason": ""}
        is_open = row["status"] == NOT_REACHED
        if row["reason"] == STARTED or (is_open and is_given_up):
            add_row(record, _row(name, case, FAILED, reason))


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
    return f"exit code {run.returncode}: {Ending(run.returncode, run.stderr).last_line()}"


def _row(name: str, case: Case, status: str, reason: str) -> Row:
    return {"side": name, "case": case.describe(), "status": status, "reason": reason}


def _summary(row: Row) -> str:
    if "ms" not in row:
        return f"{row['status']}: {row['reason']}"
    forward, both = (row["ms"][phase]["median"] for phase in ("forward", "forward_backward"))
    return f"forward {forward:.2f} ms, with backward {both:.2f} ms"
