"""Part 1: the tests that need a GPU, every row one of them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.part import Part, build_row
from benchmarks.gpu_check.programs import Finished, Program
from benchmarks.gpu_check.shard_plugin import PASSED, SKIPPED, VARIABLE, describe_shard
from benchmarks.harness.outcome import FAILED, LEFT_OUT, MEASURED
from benchmarks.harness.record import Row

_TIMEOUT_S = 540.0
_TESTS = "tests/gpu"
_PLUGIN = "benchmarks.gpu_check.shard_plugin"
Outcomes = dict[str, dict[str, Any]]
"""By name of a test; without an `outcome` where there is none yet."""


def run(part: Part) -> None:
    """Run the tests in shards side by side: most of their time is compiling kernels."""
    files = [part.scratch / f"shard{place}.jsonl" for place in range(part.jobs)]
    written: Outcomes = {}

    def add_new() -> None:
        for path in files:
            for test, outcome in read_outcomes(path).items():
                # A test that passed may fail once more, in what it leaves behind.
                is_new = "outcome" in outcome and written.get(test) != outcome
                if is_new and part.is_wanted(test):
                    written[test] = outcome
                    part.add(_row(test, outcome))

    for finished in part.each(_programs(files), jobs=part.jobs, on_poll=add_new):
        add_new()
        path = files[int(finished.program.name.removeprefix("shard "))]
        for row in _rows_without_outcome(finished, read_outcomes(path)):
            if part.is_wanted(row["name"]):
                part.add(row)
    if not (part.is_dry or any(row["status"] == MEASURED for row in part.record.rows)):
        part.add({"name": _TESTS, "status": FAILED, "reason": "not one test passed"})


def read_outcomes(path: Path) -> Outcomes:
    """Read what a shard wrote so far."""
    found: Outcomes = {}
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            outcome = json.loads(line)
            found[outcome.pop("test")] = outcome
    return found


def _programs(files: list[Path]) -> list[Program]:
    words = ("-m", "pytest", "-q", "-rs", "-p", _PLUGIN, "-p", "no:cacheprovider", _TESTS)
    return [
        Program(
            f"shard {place}",
            words,
            _TIMEOUT_S,
            environment={VARIABLE: describe_shard(place, len(files), path)},
        )
        for place, path in enumerate(files)
    ]


def _row(test: str, outcome: Mapping[str, Any]) -> Row:
    status = {PASSED: MEASURED, SKIPPED: LEFT_OUT}.get(outcome["outcome"], FAILED)
    rest = {key: value for key, value in outcome.items() if key != "outcome"}
    return {"name": test, "status": status, **rest}


def _rows_without_outcome(finished: Finished, outcomes: Outcomes) -> Iterator[Row]:
    """Yield a row for each test that the shard's end left open; for the shard if it began none."""
    left = [test for test, outcome in outcomes.items() if "outcome" not in outcome]
    row = build_row(finished, lambda _: {})
    for test in left:
        yield row | {"name": test}
    if not outcomes:
        reason = "no tests were found"
        yield row if row["status"] != MEASURED else row | {"status": FAILED, "reason": reason}
