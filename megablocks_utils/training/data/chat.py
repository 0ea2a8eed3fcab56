"""Turn ``messages`` records into tokens with the tokenizer's chat template.

Only assistant turns are learned, each with its end-of-turn token. Where a template marks them
itself (``{% generation %}``) its marks are used. Otherwise they are found by rendering the
conversation turn by turn: what an assistant turn adds to the rendering of all turns before it (with
the generation prompt) is what the model has to write.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.conversation import Conversation
from megablocks_utils.training.data.text import IGNORED_LABEL, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_messages"]

MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


def encode_messages(
    records: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase"
) -> list[Encoded]:
    """Return token ids and labels of conversations, as the chat template writes them.

    The template's text is tokenized whole and with nothing added, as at generation time: a template
    writes its own bos token.

    Raises:
        DataError: no chat template, no offsets (slow tokenizer), a conversation that the template
            refuses, or a template that rewrites earlier turns so that the turns cannot be told
            apart.
    """
    if not tokenizer.chat_template:
        raise DataError("messages need a chat template and the model's tokenizer has none")
    if not tokenizer.is_fast:
        raise DataError("messages need a fast tokenizer (one with offsets), this one is slow")
    if MARKS_ASSISTANT.search(tokenizer.get_chat_template()):
        return [_encode_marked(record, tokenizer) for record in records]
    rendered = [_render_turns(record, tokenizer) for record in records]
    batch = tokenizer(
        [text for text, _ in rendered],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    rows = zip(batch["input_ids"], batch["offset_mapping"], rendered, strict=True)
    return [(ids, _labels_in_spans(ids, offsets, spans)) for ids, offsets, (_, spans) in rows]


def _encode_marked(record: Conversation, tokenizer: Any) -> Encoded:
    encoded = _apply_template(
        record,
        tokenizer,
        record.messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    labels = [token if is_answer else IGNORED_LABEL for token, is_answer in pairs]
    return encoded["input_ids"], labels


def _render_turns(record: Conversation, tokenizer: Any) -> tuple[str, list[Span]]:
    """Return the rendered conversation and the character span of every assistant turn in it."""
    messages = record.messages
    text = _render(record, tokenizer, messages)
    spans = []
    for index in [index for index, is_learned in enumerate(record.is_learned) if is_learned]:
        before = _render(record, tokenizer, messages[:index], add_generation_prompt=True)
        after = _render(record, tokenizer, messages[: index + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise DataError(
                f"{record.place}: the tokenizer's chat template rewrites earlier turns (message "
                f"{index + 1} does not continue what came before it), so its turns cannot be told "
                "apart"
            )
        # What stands between the end-of-turn token and the next turn is the template's, not the
        # model's: generation has stopped by then.
        spans.append((len(before), len(after.rstrip())))
    return text, spans


def _render(record: Conversation, tokenizer: Any, messages: list[dict], **options: Any) -> str:
    return _apply_template(record, tokenizer, messages, tokenize=False, **options)


def _apply_template(
    record: Conversation, tokenizer: Any, messages: list[dict], **options: Any
) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tools=record.tools, **record.template_options, **options
        )
    except TemplateError as error:
        raise DataError(
            f"{record.place}: the tokenizer's chat template refuses these messages: {error}"
        ) from error


def _labels_in_spans(ids: list[int], offsets: list[Span], spans: list[Span]) -> list[int]:
    """Keep the tokens that reach into a span.

    That holds for a first word merged with a blank before it, which the prompt ends with; and for
    tokenizers that leave blanks out of their offsets, so that one of blanks alone seems empty.
    """
    labels = [IGNORED_LABEL] * len(ids)
    for index, (start, end) in enumerate(offsets):
        if any(start < high and end > low for low, high in spans):
            labels[index] = ids[index]
    return labels
