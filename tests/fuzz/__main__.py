"""Run the fuzzers: `python -m tests.fuzz --help`."""

import argparse
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

from tests.fuzz.cases import FAILURES, Case
from tests.fuzz.groups import GROUPS
from tests.fuzz.harness import SECONDS, Fuzzer, Result
from tests.fuzz.sandbox import close_scratch, open_scratch, prepare_imports

__all__ = ["choose_cases", "main"]


def main(argv: Sequence[str]) -> int:
    """Run the cases of all groups, or of those named, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--cases", type=int, help="of each group at most, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=SECONDS, help="seconds of a case")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.groups) - GROUPS.keys())
    if unknown:
        parser.error(f"no group {unknown[0]}; there are {', '.join(GROUPS)}")
    cases = choose_cases(arguments.groups or GROUPS, arguments.seed, arguments.cases)
    cases = [case for case in cases if arguments.only in case.name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the scratch folder goes
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        open_scratch(scratch)
        prepare_imports()
        results = []
        for result in Fuzzer(scratch, arguments.timeout).run(cases):
            sys.stdout.write(f"{result.as_line()}\n")
            sys.stdout.flush()
            results.append(result)
    finally:
        close_scratch(scratch)
    sys.stderr.write(format_table(results))
    return int(any(result.verdict in FAILURES for result in results))


def choose_cases(groups: Iterable[str], seed: int, number: int | None = None) -> list[Case]:
    """Return the cases of groups: all, or so many of each, drawn by the seed."""
    chosen: list[Case] = []
    for name in groups:
        generator = Random(f"{seed} {name}")
        cases = list(GROUPS[name](generator))
        chosen += cases if number is None else generator.sample(cases, min(number, len(cases)))
    return chosen


def format_table(results: Iterable[Result]) -> str:
    """Return a line for each group: how many cases came to which verdict."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        counts[result.case.group][result.verdict] += 1
        counts["all"][result.verdict] += 1
    verdicts = ["refused", "accepted", *FAILURES]
    lines = [f"{'':10}{'cases':>7}" + "".join(f"{verdict:>11}" for verdict in verdicts)]
    for group, found in sorted(counts.items(), key=lambda item: item[0] == "all"):
        numbers = "".join(f"{found[verdict] or '':>11}" for verdict in verdicts)
        lines.append(f"{group:10}{found.total():7}{numbers}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
