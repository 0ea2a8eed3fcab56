"""Turn records of the known formats into token ids and labels.

Labels are set by position, never by comparing with a padding id: many tokenizers pad with their end
token, and a mask by id would keep the end of every answer from being learned.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.alpaca import (
    MarkedText,
    check_alpaca,
    check_finished_text,
    write_alpaca,
    write_finished_text,
)
from megablocks_utils.training.data.chat import encode_messages
from megablocks_utils.training.data.chat_records import (
    check_template_reads,
    read_chat,
    read_chat_completion,
)
from megablocks_utils.training.data.conversation import Conversation
from megablocks_utils.training.data.record_keys import REFUSED_KEYS, check_keys, is_absent
from megablocks_utils.training.data.sources import Record
from megablocks_utils.training.data.spans import encode_spans
from megablocks_utils.training.data.text import Encoded, check_text
from megablocks_utils.training.data.token_records import check_tokens, read_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FORMATS", "CheckedRecords", "DataFormat", "check_records", "find_format"]
__all__ += ["read_conversation"]

WANTED_COLUMNS = (
    "instruction and output (input optional), output alone, messages, conversations, prompt and "
    "completion, or input_ids and labels"
)
PREFERENCE_KEYS = ("chosen", "rejected")


@dataclass(frozen=True)
class DataFormat:
    """Describe one way a record can be written.

    Attributes:
        name: what messages call it.
        columns: what every record must have.
        check: returns the keys of a record that are ignored; raises DataError when a key or value
            cannot be used.
        encode: turns records into token ids and labels, in the same order, with a tokenizer.
        needs_tokenizer: whether there must be one.
        applies: whether the values are this format's, where two share their columns.
    """

    name: str
    columns: tuple[str, ...]
    check: Callable[[Record], frozenset[str]]
    encode: Callable[[Sequence[Record], "PreTrainedTokenizerBase | None"], list[Encoded]]
    needs_tokenizer: bool = True
    applies: Callable[[Record], bool] = lambda record: True


@dataclass(frozen=True)
class CheckedRecords:
    """Hold what records have in common.

    Attributes:
        data_format: of all of them.
        ignored_keys: their keys that have no meaning for training.
        num_records: how many there are.
    """

    data_format: DataFormat
    ignored_keys: tuple[str, ...]
    num_records: int


def find_format(record: Record) -> DataFormat:
    """Return the format whose columns the record has.

    ``output`` alone comes last, so that a fuller description of the same example wins. Columns that
    are all null do not count, unless there is nothing else.

    Raises:
        DataError: no format fits, with the columns seen and those wanted.
    """
    columns = record.columns
    found = [f for f in FORMATS if f.applies(record) and columns.keys() >= set(f.columns)]
    filled = [f for f in found if any(columns[column] is not None for column in f.columns)]
    if filled or found:
        return (filled or found)[0]
    raise DataError(f"{record.place}: {_describe_unknown(columns)}")


def check_records(
    records: Iterable[Record], data_format: DataFormat | None = None
) -> CheckedRecords:
    """Check every record against the format of the first.

    Args:
        records: at least one.
        data_format: that of earlier records of the same source; None: these are its first.

    Raises:
        DataError: no format fits, or a record cannot be used.
    """
    remaining = iter(records)
    first = next(remaining)
    data_format = data_format or find_format(first)
    ignored: dict[str, None] = {}
    num_records = 0
    for record in chain([first], remaining):
        num_records += 1
        for column in data_format.columns:
            if column not in record.columns:
                raise DataError(
                    f"{record.place}: no column {column}, but the first record has "
                    f"{data_format.name}"
                )
        ignored |= dict.fromkeys(sorted(_check(data_format, record)))
    return CheckedRecords(data_format, tuple(ignored), num_records)


def _check(data_format: DataFormat, record: Record) -> frozenset[str]:
    try:
        return data_format.check(record)
    except RecursionError as error:
        raise DataError(f"{record.place}: lists or objects are nested too deeply") from error


def _describe_unknown(columns: dict[str, Any]) -> str:
    preference = [key for key in PREFERENCE_KEYS if not is_absent(columns.get(key))]
    if preference:
        return f"a record with {' and '.join(preference)}: {REFUSED_KEYS[preference[0]]}"
    lists = [key for key, value in columns.items() if _is_list_of_records(value)]
    if lists:
        return f"one object that holds records under {lists[0]!r}; wanted the list alone"
    return f"no known columns: found {', '.join(columns) or 'none'}; wanted {WANTED_COLUMNS}"


def _is_list_of_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _encode_alpaca(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase | None"
) -> list[Encoded]:
    return _encode_answers(records, tokenizer, write_alpaca)


def _encode_finished_text(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase | None"
) -> list[Encoded]:
    return _encode_answers(records, tokenizer, lambda record, end: write_finished_text(record))


def _has_text_prompt(record: Record) -> bool:
    return not isinstance(record.columns.get("prompt"), list)


def _has_turns_prompt(record: Record) -> bool:
    return isinstance(record.columns.get("prompt"), list)


def _check_completion(record: Record) -> frozenset[str]:
    for key in ("prompt", "completion"):
        check_text(record.place, key, record.columns[key])
    owner = "a record of prompt and completion"
    used = ("prompt", "completion")
    return frozenset(check_keys(record.place, record.columns, used, owner=owner))


def _encode_completion(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase | None"
) -> list[Encoded]:
    def write(record: Record, end_token: str) -> MarkedText:
        prompt, completion = record.columns["prompt"], record.columns["completion"]
        text = prompt + completion
        return MarkedText(text, [(len(prompt), len(text))])

    return _encode_answers(records, tokenizer, write)


def _encode_answers(
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase | None",
    write: Callable[[Record, str], MarkedText],
) -> list[Encoded]:
    """Encode texts so that exactly their answers and the end token are learned."""
    assert tokenizer is not None
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the model's tokenizer has no end token (eos_token), which answers need")
    written = [write(record, str(tokenizer.eos_token)) for record in records]
    return encode_spans(
        [marked.text for marked in written],
        [marked.spans for marked in written],
        tokenizer,
        add_start=True,
        end_token_id=end,
        places=[record.place for record in records],
    )


def _check_messages(record: Record) -> frozenset[str]:
    return read_chat(record, "messages").ignored


def _check_conversations(record: Record) -> frozenset[str]:
    return read_chat(record, "conversations").ignored


def _check_chat_completion(record: Record) -> frozenset[str]:
    return read_chat_completion(record).ignored


def _encode_chat(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase | None"
) -> list[Encoded]:
    assert tokenizer is not None
    conversations = [read_conversation(record) for record in records]
    template = tokenizer.chat_template
    if template:
        text = template if isinstance(template, str) else "\n".join(template.values())
        for conversation in conversations:
            check_template_reads(conversation, text)
    return encode_messages(conversations, tokenizer)


def read_conversation(record: Record) -> Conversation:
    """Return the conversation of a chat record, whichever its format.

    Raises:
        DataError: the record cannot be used.
    """
    for column in ("messages", "conversations"):
        if not is_absent(record.columns.get(column)):
            return read_chat(record, column).conversation
    return read_chat_completion(record).conversation


def _encode_tokens(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase | None"
) -> list[Encoded]:
    return [read_tokens(record) for record in records]


FORMATS = (
    DataFormat("instruction and output", ("instruction", "output"), check_alpaca, _encode_alpaca),
    DataFormat("messages", ("messages",), _check_messages, _encode_chat),
    DataFormat("conversations", ("conversations",), _check_conversations, _encode_chat),
    DataFormat(
        "input_ids and labels",
        ("input_ids",),
        check_tokens,
        _encode_tokens,
        needs_tokenizer=False,
    ),
    DataFormat(
        "prompt and completion",
        ("prompt", "completion"),
        _check_completion,
        _encode_completion,
        applies=_has_text_prompt,
    ),
    DataFormat(
        "prompt and completion of messages",
        ("prompt", "completion"),
        _check_chat_completion,
        _encode_chat,
        applies=_has_turns_prompt,
    ),
    DataFormat("output alone", ("output",), check_finished_text, _encode_finished_text),
)
