"""Render conversations with a tokenizer's chat template, as transformers does."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.errors import DataError
from megablocks_utils.training.data.conversation import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["GENERATED", "GENERATION_TAG", "RENDERING_LIMIT_S", "ChatTemplate", "Message"]

Message = dict[str, Any]

RENDERING_LIMIT_S = 10.0
"""Seconds for one rendering; 400 exchanges take some milliseconds."""
GENERATED = ("\U0010fffc", "\U0010fffd")
"""What stands before and after text that a template marks as generated, where that is asked for."""

GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(generation|endgeneration)\s*([-+]?)%\}")
_MARKING = (
    "{% macro show_generated_text__() %}"
    f"{{{{ '{GENERATED[0]}' }}}}{{{{ caller() }}}}{{{{ '{GENERATED[1]}' }}}}"
    "{% endmacro %}\n"
)
_TAGS = {"generation": "call show_generated_text__()", "endgeneration": "endcall"}


class ChatTemplate:
    """Hold a tokenizer's chat template, ready to render conversations.

    Args:
        tokenizer: of the model, its `chat_template` the one to use.

    Raises:
        DataError: there is no template, or only named ones.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._sources = {has_tools: self._find(has_tools) for has_tools in (False, True)}
        self._marking = {key: _show_generated(source) for key, source in self._sources.items()}
        self._text_arguments = False

    def marks_generated(self, conversation: Conversation) -> bool:
        """Say whether the template says itself what the assistant generates."""
        return bool(GENERATION_TAG.search(self._sources[conversation.tools is not None]))

    def render(
        self,
        conversation: Conversation,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        shows_generated: bool = False,
    ) -> str:
        """Return the text of messages.

        Args:
            conversation: whose tools and options the template gets.
            messages: any part of it, or messages that stand for it.
            add_generation_prompt: whether the text ends where the assistant is to answer.
            shows_generated: whether `GENERATED` encloses what the template marks so.

        Raises:
            DataError: the template refuses them, fails, or takes too long.
        """
        has_tools = conversation.tools is not None
        source = (self._marking if shows_generated else self._sources)[has_tools]

        def refused(reason: str) -> DataError:
            return DataError(
                f"{conversation.place}: the tokenizer's chat template refuses these messages: "
                f"{reason}"
            )

        def apply(given: Sequence[Message]) -> str:
            with ForeignCode(refused, limit_s=RENDERING_LIMIT_S):
                return str(
                    self._tokenizer.apply_chat_template(
                        list(given),
                        tools=None if conversation.tools is None else list(conversation.tools),
                        chat_template=source,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        **conversation.template_options,
                    )
                )

        if self._text_arguments:
            return apply(_with_text_arguments(messages))
        try:
            return apply(messages)
        except DataError as error:
            # DeepSeek-V3's template adds the arguments of tool calls to text.
            given = _with_text_arguments(messages)
            if not isinstance(error.__cause__, TypeError) or given == list(messages):
                raise
            text = apply(given)
            self._text_arguments = True
            return text

    def _find(self, has_tools: bool) -> str:
        template = self._tokenizer.chat_template
        if isinstance(template, dict):
            names = ", ".join(sorted(map(str, template))) or "none"
            template = (template.get("tool_use") if has_tools else None) or template.get("default")
            if not template:
                raise DataError(
                    f"messages need a chat template, and of the tokenizer's ({names}) none is its "
                    "default; choose one with chat_template",
                    parameters=("chat_template",),
                )
        if not template:
            raise DataError(
                "messages need a chat template and the model's tokenizer has none; give one with "
                "chat_template",
                parameters=("chat_template",),
            )
        if not isinstance(template, str):
            raise DataError(
                f"the tokenizer's chat template must be text, it is {type(template).__name__}"
            )
        return template


def _show_generated(source: str) -> str:
    """Return a template that writes `GENERATED` around what it marks as generated."""

    def replace(match: re.Match[str]) -> str:
        return f"{{%{match[1]} {_TAGS[match[2]]} {match[3]}%}}"

    return _MARKING + GENERATION_TAG.sub(replace, source)


def _with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose tool calls have their arguments as JSON text."""
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
