"""Check families: `python -m tests.families [FAMILY ...] [--output docs/families.md]`."""

import argparse
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
from transformers.utils.logging import disable_progress_bar

from tests.families.check import Row, check_family
from tests.families.table import write_page
from tests.support.rank_pool import RankPool
from tests.support.tiny_families import CAUSAL, COMPOSITE

__all__ = ["main"]

AXES = ("tp_size", "sp_size", "expert_tp_size")
"""Options of axes of which all families are checked on request, one at a time or several."""


def main(argv: Sequence[str]) -> int:
    """Check the families named, or all, and return 1 if one is neither right nor refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all of the registry's")
    parser.add_argument("--output", type=Path, help="page to write the table to")
    parser.add_argument("--no-lora", action="store_true", help="only with all weights trained")
    for name in AXES:
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help="with ep 2")
    arguments = parser.parse_args(argv)
    axes = {name: getattr(arguments, name) for name in AXES}
    known = (*CAUSAL, *COMPOSITE)
    if unknown := sorted(set(arguments.families) - set(known)):
        parser.error(f"no family {unknown[0]}; there are {', '.join(known)}")
    _keep_quiet()
    rows = []
    num_ranks = 2 * math.prod(axes.values())
    with RankPool(num_ranks) as pool, tempfile.TemporaryDirectory(prefix="families-") as folder:
        for family in arguments.families or known:
            start = time.perf_counter()
            with_lora = not arguments.no_lora
            row = check_family(pool, family, Path(folder), with_lora=with_lora, axes=axes)
            rows.append(row)
            _show(row, time.perf_counter() - start)
            if arguments.output:
                write_page(arguments.output, rows)
    sys.stdout.write(f"{dict(Counter(row.verdict for row in rows))}\n")
    return int(any(row.is_wrong for row in rows))


def _show(row: Row, seconds: float) -> None:
    words = [row.family, row.verdict, row.why, row.experts, row.batches, row.lora]
    line = " | ".join([*words, f"{seconds:.1f} s"])
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _keep_quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
