"""Find the assistant's turns in the rendering of a whole conversation.

The prompt of a turn is what generation starts from, so a turn begins where the template's
generation prompt ends, and it ends with what the template writes at the end of a conversation that
this turn closes, without the white space after it: generation has stopped by then. Where that is
nothing but white space, it is the turn's end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.chat_template import GENERATED, ChatTemplate
from megablocks_utils.training.data.conversation import Conversation
from megablocks_utils.training.data.marks import (
    Block,
    MarkedMessages,
    MarkedRendering,
)
from megablocks_utils.training.data.spans import Span
from megablocks_utils.training.data.turn_prompts import TurnPrompts

__all__ = ["Turn", "TurnFinder"]


@dataclass(frozen=True)
class Turn:
    """Hold one assistant turn in a text.

    Attributes:
        span: what the model writes.
        text: a rendering that has the turn in it.
    """

    span: Span
    text: str


@dataclass(frozen=True)
class _Form:
    """Say how a turn of a certain shape is written when it is the conversation's last.

    Attributes:
        prompt: from the end of the text before it to where the model begins.
        opening: from there to the first text of the turn.
        marks: which texts of the turn are there, in order.
        ending: from the last text of the turn to its end.
        following: from there to the next text, in the whole conversation.
    """

    prompt: str
    opening: str
    marks: tuple[int, ...]
    ending: str
    following: str


class TurnFinder:
    """Find the assistant's turns of one conversation.

    Args:
        conversation: whose turns.
        template: renders it.
    """

    def __init__(self, conversation: Conversation, template: ChatTemplate) -> None:
        self._conversation = conversation
        self._template = template
        self._messages = conversation.messages
        self._prompts = TurnPrompts(conversation, template)

    @cached_property
    def text(self) -> str:
        """The rendering of the whole conversation."""
        return self._template.render(self._conversation, self._messages)

    def find_in_whole(self, numbers: Sequence[int]) -> list[Span] | None:
        """Return where assistant turns stand in the whole conversation.

        Every turn must be written there as it is when it is the last one. That is seen on the
        first turn of each shape (which texts it has, and between which roles it stands), rendered
        as the last; all others must have the same form. So it takes few renderings, however many
        turns there are.

        Args:
            numbers: of the messages.

        Returns:
            Their spans, or None where that does not hold or cannot be seen.
        """
        found = self._prompts.mark(self._messages, self.text)
        if found is None:
            return None
        marked = found[1]
        places = {block.message: index for index, block in enumerate(marked.blocks)}
        forms: dict[tuple[object, ...], _Form | None] = {}
        spans = []
        for number in numbers:
            if number not in places:
                return None
            if number == 0:
                continue
            shape = self._shape(number)
            if shape not in forms:
                forms[shape] = self._form_as_last(number, *found, places[number])
            form = forms[shape]
            if form is None:
                return None
            span = self._place(marked, places[number], form, self._has_calls(number))
            if span is None:
                return None
            spans.append(span)
        if numbers[0] == 0:
            first = self._place_first(*found, forms)
            if first is None:
                return None
            spans.insert(0, first)
        return spans

    def _place_first(
        self,
        marks: MarkedMessages,
        whole: MarkedRendering,
        forms: Mapping[tuple[object, ...], _Form | None],
    ) -> Span | None:
        """Return where a turn stands that opens the conversation and ends as another one does.

        Alone it may not be rendered: some templates want a question in every conversation.
        """
        block = whole.blocks[0]
        endings = {form.ending for form in forms.values() if form is not None}
        is_written = block.message == 0 and len(block.marks) == 2 * marks.count(0)
        if not is_written or self._has_calls(0) or len(endings) != 1:
            return None
        ending = endings.pop()
        if not whole.text.startswith(ending, block.end):
            return None
        return self._prompts.find_header_end(whole.text, block.start), block.end + len(ending)

    def find_as_last(self, number: int) -> Turn:
        """Return an assistant turn as it is when it is the conversation's last.

        Args:
            number: of the message.

        Raises:
            DataError: it cannot be told where the turn begins.
        """
        messages = self._messages[: number + 1]
        is_whole = number + 1 == len(self._messages)
        text = self.text if is_whole else self._template.render(self._conversation, messages)
        begin = self._find_begin(number, text)
        return Turn((begin, self._find_end(number, text, begin)), text)

    def find_generated(self, number: int, text: str) -> list[Span]:
        """Return what the template marks as generated in a rendering up to a message.

        Raises:
            DataError: showing the marks changes the text.
        """
        messages = self._messages[: number + 1]
        shown = self._template.render(self._conversation, messages, shows_generated=True)
        bare, *pieces = shown.split(GENERATED[0])
        spans = []
        for piece in pieces:
            inside, _, outside = piece.partition(GENERATED[1])
            spans.append((len(bare), len(bare) + len(inside)))
            bare += inside + outside
        if bare != text:
            raise DataError(
                f"{self._conversation.place}: the chat template changes text that it marks as "
                "generated, so it is unknown where that stands"
            )
        return spans

    def _shape(self, number: int) -> tuple[object, ...]:
        message = self._messages[number]
        texts = tuple(key for key, value in message.items() if value and str(value).strip())
        calls = message.get("tool_calls") or ()
        # What follows matters where the end is found from it.
        until = number + 2 if calls else number + 1
        roles = tuple(other["role"] for other in self._messages[number - 1 : until])
        return texts, roles, len(calls)

    def _has_calls(self, number: int) -> bool:
        return bool(self._messages[number].get("tool_calls"))

    def _form_as_last(
        self, number: int, marks: MarkedMessages, whole: MarkedRendering, place: int
    ) -> _Form | None:
        """Return the form of a turn as the last one, if it has that form in the whole text too."""
        rendering = self._template.render(self._conversation, marks.messages[: number + 1])
        last = marks.read(rendering)
        if last is None or not last.blocks or last.blocks[-1].message != number:
            return None
        block = last.blocks[-1]
        before = last.blocks[-2].end if len(last.blocks) > 1 else 0
        gap = last.text[before : block.start]
        length = self._prompts.measure(number, marks, gap)
        if length is None:
            return None
        ending = last.text[block.end :]
        ending = ending.rstrip() or ending
        form = _Form(gap[:length], gap[length:], block.marks, ending, "")
        span = self._place(whole, place, form, has_calls=False)
        if span is None:
            return None
        _, following = _neighbours(whole, place)
        return _Form(form.prompt, form.opening, form.marks, ending, whole.text[span[1] : following])

    def _place(
        self, whole: MarkedRendering, place: int, form: _Form, has_calls: bool
    ) -> Span | None:
        """Return where a turn of a form stands in the whole text; None if it has another form."""
        block, text = whole.blocks[place], whole.text
        before, after = _neighbours(whole, place)
        if block.marks != form.marks:
            return None
        if text[before : block.start] != form.prompt + form.opening:
            return None
        begin = before + len(form.prompt)
        if not has_calls:
            has_end = text.startswith(form.ending, block.end)
            return (begin, block.end + len(form.ending)) if has_end else None
        # The arguments of a call carry no marks: its end is found from what follows.
        end = after - len(form.following)
        is_same = form.following and text.startswith(form.following, end) and end >= block.end
        return (begin, end) if is_same and text[end - 1 : end] == form.ending[-1:] else None

    def _find_begin(self, number: int, text: str) -> int:
        if number == 0:
            return self._find_first_begin(text)
        prompt = self._template.render(
            self._conversation, self._messages[:number], add_generation_prompt=True
        )
        if text.startswith(prompt):
            return len(prompt)
        begin = self._find_begin_by_marks(number, text)
        if begin is None:
            raise DataError(
                f"{self._conversation.place}: the chat template writes message {number + 1} after "
                "another text than the one that it gives the model to answer, so it is unknown "
                "where the answer begins; choose another template with chat_template",
                parameters=("chat_template",),
            )
        return begin

    def _find_begin_by_marks(self, number: int, text: str) -> int | None:
        """Find where a turn begins whose text does not go on from its generation prompt.

        Some templates prompt for reasoning that an answer without any does not have; others write
        turns of the same role as one.
        """
        found = self._prompts.mark(self._messages[: number + 1], text)
        if found is None or not found[1].blocks or found[1].blocks[-1].message != number:
            return None
        marks, last = found
        block = last.blocks[-1]
        before = last.blocks[-2].end if len(last.blocks) > 1 else 0
        length = self._prompts.measure(number, marks, text[before : block.start])
        return None if length is None else before + length

    def _find_first_begin(self, text: str) -> int:
        """Return where a turn begins that opens the conversation.

        There is no prompt to render then; its header is what the template writes for a prompt
        after another message.
        """
        found = self._prompts.mark(self._messages[:1], text)
        if found is None or not found[1].blocks:
            raise DataError(
                f"{self._conversation.place}: it is unknown where message 1, which is the "
                "assistant's, begins in the rendering of the chat template"
            )
        return self._prompts.find_header_end(text, found[1].blocks[0].start)

    def _find_end(self, number: int, text: str, begin: int) -> int:
        message = self._messages[number]
        written = text[begin:].rstrip()
        content = str(message.get("content") or "").strip()
        is_content = bool(content) and written.endswith(content) and not message.get("tool_calls")
        return len(text) if is_content or not written else begin + len(written)


def _neighbours(whole: MarkedRendering, place: int) -> Span:
    """Return where the text before a block ends, and where the one after it begins."""
    blocks: list[Block] = whole.blocks
    before = blocks[place - 1].end if place else 0
    after = blocks[place + 1].start if place + 1 < len(blocks) else len(whole.text)
    return before, after
