"""Where a number comes from: the command that made it, on what, and when."""

import datetime
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megablocks_utils.training.report.run_record import (
    CHECKOUT,
    describe_hardware,
    read_commit,
    read_versions,
)

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_VARIABLES = ("OMP_", "MKL_", "MALLOC_")


def build_provenance(module: str, argv: Sequence[str], **settings: Any) -> dict[str, Any]:
    """Return command, commit, versions, hardware, variables that set speed, date and `settings`."""
    return {
        "command": shlex.join(["python", "-m", module, *argv]),
        "commit": read_commit(CHECKOUT),
        "versions": read_versions(),
        "hardware": describe_hardware(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(_VARIABLES)},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **settings,
    }


def describe_provenance(content: Mapping[str, Any]) -> str:
    """Name the command of a result, its date and commit, in a line for its table."""
    commit = (content["commit"] or "unknown")[:7]
    return f"`{content['command']}`, {content['date'][:10]}, commit {commit}"
