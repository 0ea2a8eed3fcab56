"""Write Alpaca records as the texts that are learned from, and find the answers in them.

A record of `instruction`, `input` and `output` is Stanford Alpaca's prompt and the answer. Its
`system` stands in place of the prompt's first sentences, and its `history` of questions and
answers comes before as earlier instructions and responses, which are learned too: what
LlamaFactory's `alpaca` template does with them.
"""

from dataclasses import dataclass
from typing import Any

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.record_keys import (
    check_keys,
    find_repeats,
    is_absent,
    shorten,
)
from megablocks_utils.training.data.sources import Record
from megablocks_utils.training.data.text import check_text

__all__ = ["ALPACA_PROMPT", "ALPACA_PROMPT_WITH_INPUT", "RESPONSE_MARKER", "MarkedText"]
__all__ += ["alpaca_prompt", "check_alpaca", "check_finished_text", "write_alpaca"]
__all__ += ["write_finished_text"]

RESPONSE_MARKER = "### Response:"
PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
QUESTION = "### Instruction:\n{instruction}\n\n### Response:"
QUESTION_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
ALPACA_PROMPT = PREAMBLE + QUESTION
ALPACA_PROMPT_WITH_INPUT = PREAMBLE_WITH_INPUT + QUESTION_WITH_INPUT
BETWEEN_TURNS = "\n\n"
SYSTEM_KEYS = ("system", "system_prompt")


@dataclass(frozen=True)
class MarkedText:
    """Hold a text and the character spans of it that are learned."""

    text: str
    spans: list[tuple[int, int]]


def alpaca_prompt(instruction: str, input: str | None = None) -> str:
    """Return Stanford Alpaca's prompt, the one with an input section when there is an input."""
    if input:
        return ALPACA_PROMPT_WITH_INPUT.format(instruction=instruction, input=input)
    return ALPACA_PROMPT.format(instruction=instruction)


def check_alpaca(record: Record) -> frozenset[str]:
    """Return the keys of an Alpaca record that are ignored.

    Raises:
        DataError: a key that cannot be used, or a value that is no text.
    """
    place, columns = record.place, record.columns
    for key in ("instruction", "output"):
        check_text(place, key, columns[key])
    for key in ("input", *SYSTEM_KEYS):
        if not is_absent(columns.get(key)):
            check_text(place, key, columns[key])
    system = [columns[key] for key in SYSTEM_KEYS if not is_absent(columns.get(key))]
    if len(set(system)) > 1:
        raise DataError(f"{place}: system and system_prompt differ; drop one")
    if not is_absent(columns.get("history")):
        _check_history(place, columns["history"])
    used = ("instruction", "input", "output", "history", *SYSTEM_KEYS)
    texts = (columns["instruction"], columns.get("input") or "", columns["output"])
    repeats = find_repeats(columns, used, texts)
    owner = "a record of instruction and output"
    ignored = check_keys(place, columns, (*used, *repeats), owner=owner)
    return frozenset(ignored | repeats)


def write_alpaca(record: Record, end_token: str) -> MarkedText:
    """Return an Alpaca record's text, without the end token of its last answer."""
    columns = record.columns
    system = columns.get("system") or columns.get("system_prompt")
    last = (columns["instruction"], columns.get("input") or None, columns["output"])
    turns = [(question, None, answer) for question, answer in columns.get("history") or ()]
    preamble = PREAMBLE_WITH_INPUT if last[1] else PREAMBLE
    text, spans = f"{system}\n\n" if system else preamble, []
    for number, (instruction, context, answer) in enumerate([*turns, last]):
        question = QUESTION_WITH_INPUT if context else QUESTION
        text += question.format(instruction=instruction, input=context)
        is_last = number == len(turns)
        learned = answer if is_last else answer + end_token
        spans.append((len(text), len(text) + len(learned)))
        text += learned if is_last else learned + BETWEEN_TURNS
    return MarkedText(text, spans)


def check_finished_text(record: Record) -> frozenset[str]:
    """Return the keys of a finished text's record that are ignored.

    Raises:
        DataError: a key that cannot be used, no text, or no marker of where the answer begins.
    """
    text = record.columns["output"]
    check_text(record.place, "output", text)
    if RESPONSE_MARKER not in text:
        raise DataError(
            f"{record.place}: output has no {RESPONSE_MARKER!r}, so it is unknown where the answer "
            "begins"
        )
    owner = "a record of output alone"
    return frozenset(check_keys(record.place, record.columns, ("output",), owner=owner))


def write_finished_text(record: Record) -> MarkedText:
    """Return a finished text; what follows its last marker is learned."""
    text: str = record.columns["output"]
    start = text.rindex(RESPONSE_MARKER) + len(RESPONSE_MARKER)
    return MarkedText(text, [(start, len(text))])


def _check_history(place: str, history: Any) -> None:
    if not isinstance(history, list):
        raise DataError(
            f"{place}: history must be a list of [question, answer] pairs, this is "
            f"{shorten(history)}"
        )
    for number, pair in enumerate(history, start=1):
        name = f"pair {number} of history"
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{place}: {name} must be [question, answer], this is {shorten(pair)}")
        check_text(place, f"the question in {name}", pair[0])
        check_text(place, f"the answer in {name}", pair[1])
