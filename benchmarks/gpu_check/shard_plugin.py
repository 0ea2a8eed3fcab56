"""A plugin of pytest: run every n-th test, and write each outcome as it comes.

GPU_CHECK_SHARD=0/4:outcomes.jsonl python -m pytest -p benchmarks.gpu_check.shard_plugin tests/gpu
"""

import json
import os
from pathlib import Path

import pytest

VARIABLE = "GPU_CHECK_SHARD"
PASSED, SKIPPED = "passed", "skipped"


def describe_shard(place: int, count: int, path: Path) -> str:
    """Return the variable's value."""
    return f"{place}/{count}:{path}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep this shard's tests, and write down which they are."""
    place, count, path = _read_shard()
    items[:] = items[place::count]
    path.write_text("".join(f"{json.dumps({'test': item.nodeid})}\n" for item in items))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append the outcome of a test when it has one."""
    is_outcome = report.when == "call" or report.outcome != PASSED
    if not is_outcome:
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.outcome != PASSED:
        line["reason"] = _last_line(report)
    with _read_shard()[2].open("a") as lines:
        lines.write(f"{json.dumps(line)}\n")


def _last_line(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return text.strip().splitlines()[0][:300] if text.strip() else "no message"


def _read_shard() -> tuple[int, int, Path]:
    share, _, path = os.environ[VARIABLE].partition(":")
    place, _, count = share.partition("/")
    return int(place), int(count), Path(path)
