"""Where a number comes from: the command that made it, on what, and when."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megablocks_utils.training.report import run_record

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def build_provenance(module: str, argv: Sequence[str], **settings: Any) -> dict[str, Any]:
    """Return command, commit, versions, hardware, variables that set speed, date and `settings`."""
    return run_record.build_provenance(["python", "-m", module, *argv]) | settings


def describe_provenance(content: Mapping[str, Any]) -> str:
    """Name the command of a result, its date and commit, in a line for its table."""
    commit = (content["commit"] or "unknown")[:7]
    return f"`{content['command']}`, {content['date'][:10]}, commit {commit}"
