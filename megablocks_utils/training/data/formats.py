"""Turn records of the four known formats into token ids and labels.

Labels are set by position, never by comparing with a padding id: many tokenizers pad with their end
token, and a mask by id would keep the end of every answer from being learned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.chat import check_messages, encode_messages
from megablocks_utils.training.data.sources import Record
from megablocks_utils.training.data.text import IGNORED_LABEL, Encoded, check_text, encode_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ALPACA_PROMPT", "ALPACA_PROMPT_WITH_INPUT", "RESPONSE_MARKER", "DataFormat"]
__all__ += ["FORMATS", "alpaca_prompt", "find_format"]

RESPONSE_MARKER = "### Response:"
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WANTED_COLUMNS = (
    "instruction and output (input optional), output alone, messages, or input_ids and labels"
)


@dataclass(frozen=True)
class DataFormat:
    """Describe one way a record can be written.

    Attributes:
        name: what messages call it.
        columns: what every record must have.
        check: raises DataError when a record's values are unusable.
        encode: turns records into token ids and labels, in the same order, with a tokenizer; None
            where the records hold them already.
    """

    name: str
    columns: tuple[str, ...]
    check: Callable[[Record], None]
    encode: Callable[[Sequence[Record], "PreTrainedTokenizerBase"], list[Encoded]] | None


def alpaca_prompt(instruction: str, input: str | None = None) -> str:
    """Return Stanford Alpaca's prompt, the one with an input section when there is an input."""
    if input:
        return ALPACA_PROMPT_WITH_INPUT.format(instruction=instruction, input=input)
    return ALPACA_PROMPT.format(instruction=instruction)


def find_format(record: Record) -> DataFormat:
    """Return the format whose columns the record has.

    ``output`` alone comes last, so that a fuller description of the same example wins.

    Raises:
        DataError: no format fits, with the columns seen and those wanted.
    """
    for data_format in FORMATS:
        if all(column in record.columns for column in data_format.columns):
            return data_format
    seen = ", ".join(record.columns) or "none"
    raise DataError(f"{record.place}: no known columns: found {seen}; wanted {WANTED_COLUMNS}")


def _check_instruction(record: Record) -> None:
    check_text(record.place, "instruction", record.columns["instruction"])
    check_text(record.place, "output", record.columns["output"])
    if record.columns.get("input") is not None:
        check_text(record.place, "input", record.columns["input"])


def _encode_instruction(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    columns = [record.columns for record in records]
    prompts = [alpaca_prompt(c["instruction"], c.get("input")) for c in columns]
    return _encode_answers(prompts, [c["output"] for c in columns], tokenizer)


def _check_finished_text(record: Record) -> None:
    text = record.columns["output"]
    check_text(record.place, "output", text)
    if RESPONSE_MARKER not in text:
        raise DataError(
            f"{record.place}: output has no {RESPONSE_MARKER!r}, so it is unknown where the answer "
            "begins"
        )


def _encode_finished_text(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    prompts, answers = [], []
    for record in records:
        before, marker, answer = record.columns["output"].rpartition(RESPONSE_MARKER)
        prompts.append(before + marker)
        answers.append(answer)
    return _encode_answers(prompts, answers, tokenizer)


def _encode_answers(
    prompts: list[str], answers: list[str], tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    """Encode prompts and answers so that exactly the answer and the end token are learned.

    The two are tokenized apart and joined: at generation time the prompt is tokenized alone and the
    model writes what follows, so a token reaching over the border would be one that the model is
    never asked for (and would leave the border without a place for the labels to start).
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the model's tokenizer has no end token (eos_token), which answers need")
    start = _start_tokens(tokenizer)
    examples = []
    pairs = zip(encode_batch(tokenizer, prompts), encode_batch(tokenizer, answers), strict=True)
    for prompt_ids, answer_ids in pairs:
        if prompt_ids[: len(start)] != start:
            prompt_ids = start + prompt_ids
        if answer_ids[-1:] != [end]:
            answer_ids = [*answer_ids, end]
        labels = [IGNORED_LABEL] * len(prompt_ids) + answer_ids
        examples.append((prompt_ids + answer_ids, labels))
    return examples


def _start_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return what the tokenizer itself puts before a text: its bos token, or nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return list(full[:start])
    return []


def _check_tokens(record: Record) -> None:
    input_ids, labels = record.columns["input_ids"], record.columns["labels"]
    for name, values in (("input_ids", input_ids), ("labels", labels)):
        if not isinstance(values, list) or any(type(value) is not int for value in values):
            raise DataError(f"{record.place}: {name} must be a list of whole numbers")
    if len(input_ids) != len(labels):
        raise DataError(
            f"{record.place}: input_ids has {len(input_ids)} items and labels has {len(labels)}, "
            "they must be equally long"
        )
    if any(token < 0 for token in input_ids):
        raise DataError(f"{record.place}: input_ids holds the negative token {min(input_ids)}")
    if any(label < 0 and label != IGNORED_LABEL for label in labels):
        raise DataError(
            f"{record.place}: labels must be tokens or {IGNORED_LABEL}, this one holds "
            f"{min(label for label in labels if label != IGNORED_LABEL)}"
        )


FORMATS = (
    DataFormat(
        "instruction and output",
        ("instruction", "output"),
        _check_instruction,
        _encode_instruction,
    ),
    DataFormat("messages", ("messages",), check_messages, encode_messages),
    DataFormat(
        "input_ids and labels",
        ("input_ids", "labels"),
        _check_tokens,
        encode=None,
    ),
    DataFormat("output alone", ("output",), _check_finished_text, _encode_finished_text),
)
