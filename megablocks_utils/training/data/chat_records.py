"""Turn chat records into conversations: messages, ShareGPT's conversations, prompt and completion.

Beside the turns a record may hold `tools` (or OpenAI's older `functions`), `system` (or
`system_prompt`: a first turn of that role) and `chat_template_kwargs` (variables of the template).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.conversation import ASSISTANT, Conversation
from megablocks_utils.training.data.nested_values import check_value, decode_text, without_nulls
from megablocks_utils.training.data.record_keys import (
    check_keys,
    find_repeats,
    is_absent,
    shorten,
)
from megablocks_utils.training.data.sources import Record
from megablocks_utils.training.data.text import check_text
from megablocks_utils.training.data.tool_calls import read_tools
from megablocks_utils.training.data.turns import REASONING, Turn, read_turn

__all__ = ["ChatRecord", "check_template_reads", "read_chat", "read_chat_completion"]

SYSTEM_KEYS = ("system", "system_prompt")
BESIDE = ("tools", "functions", *SYSTEM_KEYS, "chat_template_kwargs")
# What the template gets otherwise, or what says how its text becomes tokens.
RESERVED_OPTIONS = frozenset(
    ("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt")
    + ("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation")
    + ("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask")
    + ("tokenizer_kwargs", "bos_token", "eos_token", "pad_token", "unk_token")
)


@dataclass(frozen=True)
class ChatRecord:
    """Hold a record's conversation and the names of the keys that it does not use."""

    conversation: Conversation
    ignored: frozenset[str]


def read_chat(record: Record, column: str) -> ChatRecord:
    """Return the conversation of a record whose turns are all in one column.

    Raises:
        DataError: a key or a turn that cannot be used, or no assistant turn.
    """
    turns = _read_turns(record, column)
    _check_has_answer(record.place, turns, column)
    repeats = _find_repeats(record, column, turns)
    return _build(record, turns, (column,), repeats, f"a record of {column}")


def read_chat_completion(record: Record) -> ChatRecord:
    """Return the conversation of a record with a list of turns as prompt and one as completion.

    Only assistant turns of the completion are learned.

    Raises:
        DataError: as `read_chat`.
    """
    prompt = [Turn(t.message, False, t.ignored) for t in _read_turns(record, "prompt")]
    completion = _read_turns(record, "completion")
    _check_has_answer(record.place, completion, "completion")
    used, owner = ("prompt", "completion"), "a record of prompt and completion"
    return _build(record, prompt + completion, used, set(), owner)


def check_template_reads(conversation: Conversation, template: str) -> None:
    """Raise DataError if the template never names something that the conversation holds.

    Its text is searched, because a template drops what it does not know without a word.
    """
    messages = conversation.messages
    wanted: list[tuple[str, tuple[str, ...]]] = []
    if conversation.tools:
        wanted.append(("tools", ("tools",)))
    if any("tool_calls" in message for message in messages):
        wanted.append(("tool_calls", ("tool_calls",)))
    if any(message.get(REASONING[0]) for message in messages):
        wanted.append(("reasoning", REASONING))
    options = {k: v for k, v in conversation.template_options.items() if not is_absent(v)}
    wanted += [(f"chat_template_kwargs' {key}", (key,)) for key in options]
    for what, names in wanted:
        if not re.search(rf"\b({'|'.join(map(re.escape, names))})\b", template):
            raise DataError(
                f"{conversation.place}: the record has {what}, which the tokenizer's chat template "
                "never reads; drop them or choose another template with chat_template",
                parameters=("chat_template",),
            )


def _read_turns(record: Record, column: str) -> list[Turn]:
    place, values = record.place, record.columns[column]
    if not isinstance(values, list) or not values:
        raise DataError(f"{place}: {column} must be a list of at least one role/content object")
    label = "message" if column in ("messages", "conversations") else f"{column} message"
    return [
        read_turn(place, f"{label} {n}", value, pads_with_nulls=record.pads_with_nulls)
        for n, value in enumerate(values, start=1)
    ]


def _check_has_answer(place: str, turns: Sequence[Turn], column: str) -> None:
    if not any(turn.message["role"] == ASSISTANT for turn in turns):
        raise DataError(f"{place}: {column} has no assistant turn, so there is nothing to learn")


def _build(
    record: Record, turns: list[Turn], used: tuple[str, ...], repeats: set[str], owner: str
) -> ChatRecord:
    place, columns = record.place, record.columns
    ignored = check_keys(place, columns, (*used, *BESIDE, *repeats), owner=owner)
    system = _system_turn(record, turns[0])
    turns = [*system, *turns]
    conversation = Conversation(
        place=place,
        messages=[turn.message for turn in turns],
        is_learned=tuple(turn.is_learned for turn in turns),
        tools=read_tools(place, columns, pads_with_nulls=record.pads_with_nulls),
        template_options=_template_options(record),
    )
    in_turns = {f"{used[0]}.{key}" for turn in turns for key in turn.ignored}
    return ChatRecord(conversation, frozenset(ignored | repeats | in_turns))


def _system_turn(record: Record, first: Turn) -> list[Turn]:
    """Return the turn that the record's `system` asks for; none where the first turn repeats it."""
    given = {k: record.columns[k] for k in SYSTEM_KEYS if not is_absent(record.columns.get(k))}
    for key, text in given.items():
        check_text(record.place, key, text)
    if len(set(given.values())) > 1:
        raise DataError(f"{record.place}: system and system_prompt differ; drop one")
    if not given:
        return []
    key, text = next(iter(given.items()))
    if first.message["role"] not in ("system", "developer"):
        return [Turn({"role": "system", "content": text}, is_learned=False)]
    if first.message["content"] != text:
        raise DataError(
            f"{record.place}: {key} differs from the first message, which is a system's"
        )
    return []


def _template_options(record: Record) -> dict[str, Any]:
    name, place = "chat_template_kwargs", record.place
    if is_absent(record.columns.get(name)):
        return {}
    options = decode_text(place, name, record.columns[name])
    if not isinstance(options, dict):
        raise DataError(f"{place}: {name} must be an object, this is {shorten(options)}")
    check_value(place, name, options)
    reserved = sorted(RESERVED_OPTIONS & options.keys())
    if reserved:
        raise DataError(f"{place}: {name} sets {reserved[0]}, which is not a record's to set")
    return without_nulls(options) if record.pads_with_nulls else options


def _find_repeats(record: Record, column: str, turns: Sequence[Turn]) -> set[str]:
    """Return the keys that hold again what the turns say, or as `prompt` the first of them."""
    texts = [turn.message["content"] for turn in turns]
    repeats = find_repeats(record.columns, (column, *BESIDE), texts)
    prompt = record.columns.get("prompt")
    if isinstance(prompt, list) and prompt and prompt == record.columns[column][: len(prompt)]:
        repeats.add("prompt")
    return repeats
