"""Mark the texts of messages, so that a rendering shows where each of them stands in it.

A mark is one character of Unicode's private planes before a text, and one after it. A template that
copies texts writes the marks along; without them its rendering must be what it was.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megablocks_utils.training.data.chat_template import Message
from megablocks_utils.training.data.conversation import ASSISTANT

__all__ = ["THINK_TAG", "Block", "MarkedMessages", "MarkedRendering", "mark_messages"]

THINK_TAG = re.compile(r"(\s*</?think>\s*)")
"""What templates cut the reasoning out of an answer by."""

_PRIVATE = re.compile("[\U000f0000-\U0010fffd]")
_FIRST_BEFORE, _FIRST_AFTER = 0xF0000, 0x100000
_MAX_MARKS = 0xFFF0
_LEADING_TAGS = re.compile(r"\s*(?:<[^<>\s]{1,40}>\s*)*")
_TRAILING_TAG = re.compile(r"<[^<>\s]{1,40}>\Z")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Block:
    """Say where the texts of one message stand, without marks.

    Attributes:
        message: its number.
        start: where the first of them begins.
        end: where the last of them ends.
        marks: which marks are there, in order, counted from the message's first: its form.
    """

    message: int
    start: int
    end: int
    marks: tuple[int, ...]


@dataclass(frozen=True)
class MarkedRendering:
    """Hold a rendering of marked messages.

    Attributes:
        text: without marks.
        blocks: where each message stands, in the order of the text.
    """

    text: str
    blocks: list[Block]


class MarkedMessages:
    """Hold messages with marks in their texts.

    Attributes:
        messages: as many as there were.
    """

    def __init__(self, messages: Sequence[Message], *, inside_blanks: bool) -> None:
        self._owners: list[int] = []
        self._first: list[int] = []
        self._inside_blanks = inside_blanks
        self.messages = [
            self._mark_message(number, message) for number, message in enumerate(messages)
        ]

    def count(self, message: int) -> int:
        """Return how many texts of a message are marked."""
        return self._owners.count(message)

    def read(self, rendering: str) -> MarkedRendering | None:
        """Return where the messages stand in a rendering; None where they stand in one another."""
        pieces, position, length = [], 0, 0
        found: dict[int, list[tuple[int, int]]] = {}
        order: list[int] = []
        for match in _PRIVATE.finditer(rendering):
            pieces.append(rendering[position : match.start()])
            length += match.start() - position
            position = match.end()
            mark = self._read_mark(match[0])
            if mark is None:
                return None
            message, code = mark
            if not order or order[-1] != message:
                order.append(message)
            found.setdefault(message, []).append((length, code))
        if len(order) != len(found):
            return None
        blocks = [
            Block(message, places[0][0], places[-1][0], tuple(code for _, code in places))
            for message, places in ((message, found[message]) for message in order)
        ]
        return MarkedRendering("".join((*pieces, rendering[position:])), blocks)

    def _read_mark(self, mark: str) -> tuple[int, int] | None:
        code = ord(mark)
        is_after = code >= _FIRST_AFTER
        number = code - (_FIRST_AFTER if is_after else _FIRST_BEFORE)
        if number >= len(self._owners):
            return None
        message = self._owners[number]
        return message, 2 * (number - self._first[message]) + is_after

    def _mark_message(self, number: int, message: Message) -> Message:
        self._first.append(len(self._owners))
        marked = dict(message)
        for key in ("content", *_REASONING_KEYS):
            if isinstance(message.get(key), str):
                marked[key] = "".join(self._mark_content(number, message, message[key]))
        if isinstance(message.get("tool_calls"), list):
            marked["tool_calls"] = [self._mark_call(number, call) for call in message["tool_calls"]]
        return marked

    def _mark_content(self, number: int, message: Message, text: str) -> Iterator[str]:
        if message["role"] == ASSISTANT:
            for part in THINK_TAG.split(text):
                yield part if THINK_TAG.fullmatch(part) else self._mark(number, part)
            return
        # Templates look at how the text of a user begins and ends: `<tool_response>`.
        matched = _LEADING_TAGS.match(text)
        start, end = matched.end() if matched and "<" in matched[0] else 0, len(text)
        while match := _TRAILING_TAG.search(text[start:end].rstrip()):
            end = start + match.start()
        yield text[:start]
        yield self._mark(number, text[start:end])
        yield text[end:]

    def _mark_call(self, number: int, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return call
        return {**call, "function": {**function, "name": self._mark(number, function["name"])}}

    def _mark(self, number: int, text: str) -> str:
        core = text.strip()
        if not core or len(self._owners) >= _MAX_MARKS:
            return text
        if self._inside_blanks:
            lead, trail = text[: text.index(core[0])], text[len(text.rstrip()) :]
        else:
            core, lead, trail = text, "", ""
        mark = len(self._owners)
        self._owners.append(number)
        return f"{lead}{chr(_FIRST_BEFORE + mark)}{core}{chr(_FIRST_AFTER + mark)}{trail}"


def mark_messages(messages: Sequence[Message], *, inside_blanks: bool = False) -> MarkedMessages:
    """Return messages with marks around their texts.

    Args:
        messages: of a conversation.
        inside_blanks: whether marks stand inside the blanks that a text begins and ends with, for
            templates that strip them.
    """
    return MarkedMessages(messages, inside_blanks=inside_blanks)
