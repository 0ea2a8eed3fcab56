"""Turn conversations into tokens with the tokenizer's chat template.

Only the assistant's turns are learned, each with its end. A conversation is rendered whole, the
turns are found in that one text (`assistant_turns`), and the text is tokenized whole (`spans`).
Where a template marks what the assistant generates (`{% generation %}`), only what it marks is
learned of the turns found, so that a mark that reaches further teaches no header and nobody else's
text.

Many templates write a turn otherwise once others follow it: they drop its reasoning, or end only
the last turn. Training on that text would teach answers that generation never begins with. Such a
conversation becomes one example for each assistant turn: the conversation up to that turn, of which
only that turn is learned, as it is written when it is the last. So training sees what the model
will be asked for, with any template, and each turn is learned once; the price is that earlier turns
are read again in each example. A training template (`templates`) that writes all turns alike keeps
one example a conversation.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megablocks_utils.checkpoint.foreign_code import MemoryLimit
from megablocks_utils.errors import DataError
from megablocks_utils.training.data.assistant_turns import Turn, TurnFinder
from megablocks_utils.training.data.chat_template import ChatTemplate, Message
from megablocks_utils.training.data.conversation import ASSISTANT, Conversation
from megablocks_utils.training.data.marks import THINK_TAG
from megablocks_utils.training.data.spans import Span, encode_spans
from megablocks_utils.training.data.text import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_messages"]

RENDERING_LIMIT_BYTES = 2 * 1024**3


def encode_messages(
    conversations: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    """Return token ids and labels of conversations, in their order.

    A conversation gives one example, or one for each learned turn. Nothing is added to the
    template's text, as at generation time: a template writes its own bos token.

    Raises:
        DataError: no chat template; a conversation that it refuses, fails on or drops texts of; or
            a turn whose beginning cannot be told.
    """
    template = ChatTemplate(tokenizer)
    texts: list[str] = []
    spans: list[list[Span]] = []
    places: list[str] = []
    with MemoryLimit(RENDERING_LIMIT_BYTES):
        for conversation in conversations:
            for text, learned in _render_examples(conversation, template):
                texts.append(text)
                spans.append(learned)
                places.append(conversation.place)
    return encode_spans(texts, spans, tokenizer, places=places)


def _render_examples(
    conversation: Conversation, template: ChatTemplate
) -> Iterator[tuple[str, list[Span]]]:
    """Yield the texts of a conversation's examples and the spans to learn of each."""
    finder = TurnFinder(conversation, template)
    learned = [number for number, is_learned in enumerate(conversation.is_learned) if is_learned]
    _check_prompts(conversation, template, finder.text)
    if not learned:
        yield finder.text, []
        return
    whole = finder.find_in_whole(learned) if len(learned) > 1 else None
    if whole is None:
        turns = [finder.find_as_last(number) for number in learned]
        if all(finder.text.startswith(turn.text[: turn.span[1]]) for turn in turns):
            whole = [turn.span for turn in turns]
    if whole is not None:
        turns = [Turn(span, finder.text) for span in whole]
    for number, turn in zip(learned, turns, strict=True):
        _check_turn(conversation, template, number, turn)
    is_marked = template.marks_generated(conversation)
    if whole is None:
        for number, turn in zip(learned, turns, strict=True):
            generated = finder.find_generated(number, turn.text) if is_marked else [turn.span]
            yield turn.text, _intersect([turn.span], generated)
        return
    last = len(conversation.messages) - 1
    yield (
        finder.text,
        _intersect(whole, finder.find_generated(last, finder.text) if is_marked else whole),
    )


def _intersect(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """Return what two lists of spans, each in order, have in common."""
    if spans is others:
        return list(spans)
    shared, start = [], 0
    for low, high in spans:
        while start < len(others) and others[start][1] <= low:
            start += 1
        for other_low, other_high in others[start:]:
            if other_low >= high:
                break
            shared.append((max(low, other_low), min(high, other_high)))
    return shared


def _check_prompts(conversation: Conversation, template: ChatTemplate, text: str) -> None:
    """Raise DataError if the template leaves out what another than the assistant says."""
    messages, position = conversation.messages, 0
    for number, message in enumerate(messages):
        content = str(message.get("content") or "").strip()
        if message["role"] == ASSISTANT or not content:
            continue
        found = text.find(content, position)
        if found < 0:
            found = text.find(content)
        if found >= 0:
            position = found
            continue
        others = [*messages]
        others[number] = {**message, "content": f"{content}!"}
        if template.render(conversation, others) == text:
            raise DataError(
                f"{conversation.place}: the chat template leaves out message {number + 1} (role "
                f"{message['role']}); choose another template with chat_template",
                parameters=("chat_template",),
            )


def _check_turn(
    conversation: Conversation, template: ChatTemplate, number: int, turn: Turn
) -> None:
    """Raise DataError if the template leaves out some of what a turn says."""
    message = conversation.messages[number]
    written = turn.text[slice(*turn.span)]
    for key, changed in _change_parts(message, written):
        messages = [*conversation.messages[:number], changed]
        before = [*messages[:-1], message]
        if template.render(conversation, messages) == template.render(conversation, before):
            raise DataError(
                f"{conversation.place}: the chat template leaves out {key} of message "
                f"{number + 1}, which would not be learned; choose another template with "
                "chat_template, or remove it",
                parameters=("chat_template",),
            )


def _change_parts(message: Message, written: str) -> Iterator[tuple[str, Message]]:
    """Yield the name of each text of a message that is not written, and a message with another."""
    for key in ("reasoning_content", "content"):
        text = message.get(key)
        if not isinstance(text, str):
            continue
        parts = THINK_TAG.split(text)
        for index, part in enumerate(parts):
            if part.strip() in written or THINK_TAG.fullmatch(part):
                continue
            others = [*parts]
            others[index] = f"{part.rstrip()}!"
            name = f"the reasoning in the {key}" if index + 1 < len(parts) else f"the {key}"
            yield name, {**message, key: "".join(others)}
