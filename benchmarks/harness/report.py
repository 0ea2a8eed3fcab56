"""Results for people: Markdown tables, spreads, and the marked parts of a page."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.harness.record import Row


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], num_left: int = 1) -> str:
    """Return a Markdown table.

    Args:
        columns: their heads.
        rows: of cells.
        num_left: number of columns that are aligned left; the others are aligned right.
    """
    marks = ["---" if place < num_left else "---:" for place in range(len(columns))]
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(marks)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def format_spread(
    values: Mapping[str, float], digits: int = 2, *, unit: float = 1, is_bold: bool = False
) -> str:
    """Return median, minimum and maximum as a cell; `unit` is what they are divided by."""
    middle, least, most = (f"{values[key] / unit:.{digits}f}" for key in ("median", "min", "max"))
    return f"**{middle}** ({least}-{most})" if is_bold else f"{middle} ({least}-{most})"


def group_rows(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows by the values of some of their keys, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def fill_in(text: str, parts: Mapping[str, str], of: str) -> str:
    """Put each part between its marks, `<!-- OF: NAME -->` and `<!-- end -->`."""
    for name, part in parts.items():
        start, end = f"<!-- {of}: {name} -->", "<!-- end -->"
        before, mark, rest = text.partition(start)
        if mark:
            after = rest[rest.index(end) :]
            text = f"{before}{start}\n\n{part}\n\n{after}"
    return text


def show(text: str) -> None:
    """Write a result to standard output."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Write a line of progress to standard error."""
    sys.stderr.write(text + "\n")
