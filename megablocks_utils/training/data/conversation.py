"""A conversation as chat templates take it, whatever form its record had."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ASSISTANT", "Conversation"]

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Conversation:
    """Hold the turns of one example and what the chat template gets beside them.

    Attributes:
        place: where its record was read, for messages.
        messages: the turns in the template's own keys: `role`, `content` as text, and where given
            `tool_calls` (arguments as objects), `tool_call_id`, `name`, `reasoning_content`.
        is_learned: for each message whether it is learned: an assistant turn that its record does
            not exclude.
        tools: descriptions of the functions that the assistant may call; None without.
        template_options: further variables of the template, by name.
    """

    place: str
    messages: list[dict[str, Any]]
    is_learned: tuple[bool, ...]
    tools: list[dict[str, Any]] | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
