"""Matrices of runs on the tests' pools of ranks: where they run, and how they end."""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.record import Record
from benchmarks.harness.report import say, show
from tests.support.parity import ParityFolder
from tests.support.rank_pool import RankPool


@contextmanager
def open_rank_pools(*sizes: int) -> Iterator[tuple[dict[int, RankPool], ParityFolder]]:
    """Yield pools of ranks by size, and a folder that is removed afterwards; one thread a rank."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = ParityFolder(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        yield {size: stack.enter_context(RankPool(size)) for size in sizes}, folder


def finish(path: Path, content: Mapping[str, Any], table: str, violations: Sequence[str]) -> None:
    """Write the result, show its table, and end: with exit code 1 if a bound is violated."""
    Record(path, dict(content)).write()
    show(table)
    for violation in violations:
        say(violation)
    sys.exit(bool(violations))
