"""Answers to held-out prompts, side by side with the first ones: `samples.jsonl`, `samples.md`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megablocks_utils.files import publish_file

__all__ = ["Sample", "describe_sample", "format_samples", "read_samples", "write_samples_page"]

_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Sample:
    """Hold one held-out prompt and how it was answered after a step.

    Attributes:
        step: Optimizer steps done; 0 before the first.
        sample: Which prompt, from 1.
        prompt: Its text.
        expected: How the held-out example goes on.
        first_answer: The answer of the first evaluation.
        answer: That of this one.
    """

    step: int
    sample: int
    prompt: str
    expected: str
    first_answer: str
    answer: str


def read_samples(path: str | Path) -> list[Sample]:
    """Read `samples.jsonl` back."""
    with Path(path).open(encoding="utf-8") as lines:
        return [Sample(**json.loads(line)) for line in lines]


def describe_sample(sample: Sample) -> str:
    """Return a line for the log."""
    first, now = _shorten(sample.first_answer), _shorten(sample.answer)
    return f"sample {sample.sample}: {now}" + ("" if first == now else f" (at first: {first})")


def format_samples(samples: Sequence[Sample]) -> str:
    """Return the answers of one evaluation beside the first ones, as a table in Markdown."""
    rows = [("prompt", "expected", "first answer", f"answer after step {samples[0].step}")]
    rows += [("---",) * 4]
    rows += [(s.prompt, s.expected, s.first_answer, s.answer) for s in samples]
    return "".join(f"| {' | '.join(map(_as_cell, row))} |\n" for row in rows)


def _as_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[: _SHOWN_CHARACTERS - 3]}..."


def write_samples_page(samples: Sequence[Sample], path: Path) -> None:
    """Write the last answers beside the first ones as Markdown.

    Args:
        samples: of all evaluations, in their order.
        path: the file.

    Raises:
        OSError: it cannot be written.
    """
    last = {sample.sample: asdict(sample) for sample in samples}
    first_step = samples[0].step if samples else 0
    parts = ["# Answers to held-out prompts\n"]
    for number, sample in sorted(last.items()):
        parts.append(f"## {number}\n")
        for title, name in (
            ("Prompt", "prompt"),
            ("Expected", "expected"),
            (f"After step {first_step}", "first_answer"),
            (f"After step {sample['step']}", "answer"),
        ):
            parts.append(f"{title}:\n\n{_quote(str(sample[name]))}\n")
    with publish_file(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def _quote(text: str) -> str:
    """Return text as an indented block, in which nothing is markup."""
    return "\n".join(f"    {line}" for line in (text or "(nothing)").splitlines() or [""])
