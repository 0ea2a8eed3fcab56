"""Command lines of tests: a common one, and what a test has otherwise."""

from collections.abc import Sequence

__all__ = ["keep_last"]


def keep_last(argv: Sequence[str]) -> list[str]:
    """Return a command line in which of options given twice only the last is left.

    The scripts refuse such a line; tests add what they have otherwise to a common one.
    """
    groups: dict[str, list[str]] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name = word.partition("=")[0]
            groups.pop(name, None)
        groups.setdefault(name, []).append(word)
    return [word for group in groups.values() for word in group]
