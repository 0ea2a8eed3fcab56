"""What a case is, and what may come of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, Literal

__all__ = ["FAILURES", "Case", "Expected", "Generate", "Mutation", "Verdict", "show"]

Expected = Literal["refused", "same", "any"]
"""What may come of a case that ends with no defect: a refusal; a refusal or the result of the
unmutated input ("same"); a refusal or any result, because the mutation means something ("any")."""

Verdict = Literal[
    *("refused", "accepted"),
    *("changed", "taken", "wrote", "silent", "traceback", "hang", "other"),
]  # fmt: skip
FAILURES: Mapping[Verdict, str] = MappingProxyType(
    {
        "changed": "accepted, and the result is another one",
        "taken": "accepted, though it must be refused",
        "wrote": "refused, after something was written",
        "silent": "refused without a sentence, or with more than one",
        "traceback": "a traceback",
        "hang": "no end",
        "other": "another exit code, or killed",
    }
)
Mutation = Callable[[Path], None]
"""Changes a copy of an input, a file or a folder, in place."""


@dataclass(frozen=True)
class Case:
    """Describe one run with a mutated input.

    Attributes:
        group: of the case.
        name: of the mutation, unique in the group.
        base: the run that is mutated, a name in `ground.BASES`.
        words: options of the command line, in place of the base's; `{inputs}` is the folder of
            mutated copies.
        mutations: input of the base -> what is done to a copy of it.
        environ: environment variables, None to take one away.
        expected: what may come of it.
        codes: exit codes of a refusal.
    """

    group: str
    name: str
    base: str
    words: tuple[str, ...] = ()
    mutations: Mapping[str, Mutation] = field(default_factory=dict)
    environ: Mapping[str, str | None] = field(default_factory=dict)
    expected: Expected = "same"
    codes: tuple[int, ...] = (2, 3)


Generate = Callable[[Random], Iterator[Case]]
"""Yields the cases of a group; the same ones for the same seed."""


def show(value: Any) -> str:
    """Return a value as the name of a case shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"
