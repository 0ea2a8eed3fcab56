"""The page of all families in the documentation: one line for families that came to the same."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import transformers

from tests.families.check import Row, Verdict

__all__ = ["write_page"]

_HEAD = """# Families

Made by `python -m tests.families --output docs/families.md` with transformers {version}: every
family of its registry with experts, {total} in all. A tiny random model of each is saved by
transformers, loaded slice by slice and trained for a step at ep 2 on two ranks with FSDP2, two
examples to a micro-batch. Loss and every gradient must equal stock transformers' (`eager`, one
process, one example at a time) to 1e-5 in fp32, or be no farther from fp64 than twice stock's own.
The written model must hold what was trained, and all else bit for bit. {adapters}

{counts}.
"""
_ADAPTERS = """An adapter
(`--use_lora all`) must give plain PEFT our loss and gradient norm."""
_NO_ADAPTERS = """Adapters
were left out of this run; what was measured of them is in `benchmarks/results/families.md`."""
_WORKS_HEAD = "| families | experts | batches | adapters |\n|---|---|---|---|\n"
_OTHER_HEAD = "| families | | because |\n|---|---|---|\n"


def write_page(path: Path, rows: Sequence[Row]) -> None:
    """Write the page."""
    counts = ", ".join(_count(rows))
    adapters = _ADAPTERS if any(row.lora for row in rows) else _NO_ADAPTERS
    version = transformers.__version__
    head = _HEAD.format(version=version, total=len(rows), counts=counts, adapters=adapters)
    works = [row for row in rows if row.verdict == Verdict.WORKS]
    others = [row for row in rows if row.verdict != Verdict.WORKS]
    tables = [_WORKS_HEAD, *_lines(works, "experts", "batches", "lora")]
    if others:
        tables += ["\n", _OTHER_HEAD, *_lines(others, "verdict", "why")]
    path.write_text("".join([head, "\n", *tables]), encoding="utf-8")


def _count(rows: Sequence[Row]) -> Iterator[str]:
    kinds = (Verdict.WORKS, Verdict.REFUSED, Verdict.WRONG, Verdict.FAILS, Verdict.NOT_BUILT)
    for verdict in kinds:
        if number := sum(row.verdict == verdict for row in rows):
            yield f"{number} {verdict}"


def _lines(rows: Sequence[Row], *columns: str) -> Iterator[str]:
    """Yield a line for all families that have the same values."""
    families = defaultdict(list)
    for row in rows:
        shown = {"why": row.why.replace(row.family, "FAMILY")}
        key = tuple(_cell(shown.get(column, getattr(row, column))) for column in columns)
        families[key].append(row.family)
    for values, names in sorted(families.items(), key=lambda item: (-len(item[1]), item[0])):
        cells = chain([", ".join(f"`{name}`" for name in names)], values)
        yield f"| {' | '.join(cells)} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
