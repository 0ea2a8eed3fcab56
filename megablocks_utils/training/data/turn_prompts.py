"""Tell where the prompt of an assistant turn ends in a rendering."""

from collections.abc import Sequence
from functools import cached_property
from os.path import commonprefix

from megablocks_utils.training.data.chat_template import ChatTemplate, Message
from megablocks_utils.training.data.conversation import ASSISTANT, Conversation
from megablocks_utils.training.data.marks import MarkedMessages, MarkedRendering, mark_messages

__all__ = ["TurnPrompts"]


class TurnPrompts:
    """Render what stands before the assistant's turns of one conversation.

    Args:
        conversation: whose turns.
        template: renders it.
    """

    def __init__(self, conversation: Conversation, template: ChatTemplate) -> None:
        self._conversation = conversation
        self._template = template
        self._messages = conversation.messages

    def mark(
        self, messages: Sequence[Message], text: str
    ) -> tuple[MarkedMessages, MarkedRendering] | None:
        """Return messages with marks and their rendering; None where marks change it."""
        for inside_blanks in (False, True):
            marks = mark_messages(messages, inside_blanks=inside_blanks)
            marked = marks.read(self._template.render(self._conversation, marks.messages))
            if marked is not None and marked.text == text:
                return marks, marked
        return None

    def measure(self, number: int, marks: MarkedMessages, gap: str) -> int | None:
        """Return how much of the text before a turn's first word is its prompt.

        Args:
            number: of the turn.
            marks: of the messages up to it.
            gap: what the template writes between the text before the turn and the turn's own.
        """
        prompt = self._read_tail(number, marks, add_generation_prompt=True)
        if prompt is None:
            return None
        common = len(commonprefix((gap, prompt)))
        if common == len(prompt) or common >= len(gap.rstrip()):
            return common
        # Prompts for reasoning go on otherwise than answers without any; all of them end the turn
        # before in the same way.
        ended = self._read_tail(number, marks, add_generation_prompt=False)
        if ended is not None and 0 < len(ended.rstrip()) <= common:
            return common
        if self._header and self._header in gap:
            return gap.rindex(self._header) + len(self._header)
        # Turns of one role in a row may be written as one.
        return 0 if self._messages[number - 1]["role"] == ASSISTANT else None

    def find_header_end(self, text: str, start: int) -> int:
        """Return where the last header before a place ends; that place if there is none."""
        position = text.rfind(self._header, 0, start) if self._header else -1
        return start if position < 0 else position + len(self._header)

    @cached_property
    def _header(self) -> str:
        """What the template adds to a conversation for the model to answer."""
        question = [{"role": "user", "content": "?"}]
        asked = self._template.render(self._conversation, question)
        prompt = self._template.render(self._conversation, question, add_generation_prompt=True)
        return prompt[len(asked) :] if prompt.startswith(asked) else ""

    def _read_tail(
        self, number: int, marks: MarkedMessages, *, add_generation_prompt: bool
    ) -> str | None:
        """Return what the template writes after the last text before a turn."""
        rendering = self._template.render(
            self._conversation,
            marks.messages[:number],
            add_generation_prompt=add_generation_prompt,
        )
        tail = marks.read(rendering)
        if tail is None:
            return None
        return tail.text[tail.blocks[-1].end if tail.blocks else 0 :]
