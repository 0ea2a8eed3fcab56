"""Read one turn of a conversation: OpenAI's role and content, or ShareGPT's from and value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.conversation import ASSISTANT
from megablocks_utils.training.data.nested_values import without_nulls
from megablocks_utils.training.data.record_keys import check_keys, is_absent, shorten
from megablocks_utils.training.data.text import check_text
from megablocks_utils.training.data.tool_calls import read_tool_calls

__all__ = ["Turn", "read_turn"]

ROLES = ("system", "developer", "user", ASSISTANT, "tool")
TEMPLATE_ROLES = ("ipython", "observation")
"""Names of the tool's role in the templates of Llama 3.1 and of GLM."""
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "assistant": ASSISTANT,
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
FUNCTION_CALL = "function_call"
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of an assistant's reasoning, the first before the others, as in transformers."""
FLAGS = ("weight", "train", "training", "loss")
USED = ("role", "content", "from", "value", "name", "tool_calls", FUNCTION_CALL, "tool_call_id")


@dataclass(frozen=True)
class Turn:
    """Hold one turn as templates take it.

    Attributes:
        message: role, content and what else the template gets.
        is_learned: an assistant turn that no flag excludes.
        ignored: its keys without a meaning for training.
    """

    message: dict[str, Any]
    is_learned: bool
    ignored: set[str] = field(default_factory=set)


def read_turn(place: str, name: str, value: Any, *, pads_with_nulls: bool) -> Turn:
    """Return a turn in the template's form.

    Args:
        place: where the record was read.
        name: what messages call the turn, such as ``message 2``.
        value: the turn as the record has it.
        pads_with_nulls: whether nulls within tool calls stand for keys that are not there.

    Raises:
        DataError: a turn without role or content, or with what has no meaning there.
    """
    if not isinstance(value, dict):
        raise DataError(f"{place}: {name} must be an object with role and content")
    given = {key: item for key, item in value.items() if item is not None}
    ignored = check_keys(place, given, (*USED, *REASONING, *FLAGS), owner=name)
    role, content = _role_and_content(place, name, given)
    calls = _calls(place, name, given, pads_with_nulls=pads_with_nulls)
    if role == FUNCTION_CALL:
        calls = read_tool_calls(place, f"value of {name}", content, pads_with_nulls=pads_with_nulls)
        role, content = ASSISTANT, ""
    message: dict[str, Any] = {
        "role": role,
        "content": _text(place, name, content, has_calls=bool(calls)),
    }
    message |= _extras(place, name, role, given)
    if calls:
        _check_role(place, f"tool_calls of {name}", role, ASSISTANT)
        message["tool_calls"] = calls
    return Turn(message, _is_learned(place, name, role, given), ignored)


def _role_and_content(place: str, name: str, given: Mapping[str, Any]) -> tuple[str, Any]:
    is_sharegpt = "from" in given or "value" in given
    if is_sharegpt and ("role" in given or "content" in given):
        raise DataError(f"{place}: {name} has from and value beside role and content; drop one")
    if is_sharegpt:
        tag = given.get("from")
        check_text(place, f"from of {name}", tag)
        if tag == FUNCTION_CALL:
            return FUNCTION_CALL, given.get("value")
        if tag not in SHAREGPT_ROLES:
            wanted = ", ".join((*SHAREGPT_ROLES, FUNCTION_CALL))
            raise DataError(f"{place}: from of {name} is {shorten(tag)}, wanted one of {wanted}")
        return SHAREGPT_ROLES[tag], given.get("value")
    if "role" not in given:
        raise DataError(f"{place}: {name} must be an object with role and content")
    role = given["role"]
    check_text(place, f"role of {name}", role)
    if role == "function":  # OpenAI's name of the tool's role, as long as there was one function
        return "tool", given.get("content")
    if role not in (*ROLES, *TEMPLATE_ROLES):
        wanted = ", ".join(ROLES)
        raise DataError(f"{place}: role of {name} is {shorten(role)}, wanted one of {wanted}")
    return role, given.get("content")


def _calls(
    place: str, name: str, given: Mapping[str, Any], *, pads_with_nulls: bool
) -> list[dict[str, Any]]:
    """Return the calls of a turn, from `tool_calls` or OpenAI's older `function_call`."""
    keys = [key for key in ("tool_calls", FUNCTION_CALL) if not is_absent(given.get(key))]
    if len(keys) == 2:
        raise DataError(f"{place}: {name} has tool_calls and function_call; drop function_call")
    if not keys:
        return []
    label = f"{keys[0]} of {name}"
    return read_tool_calls(place, label, given[keys[0]], pads_with_nulls=pads_with_nulls)


def _text(place: str, name: str, content: Any, *, has_calls: bool) -> str:
    """Return the content as one text.

    Nothing beside tool calls becomes the empty text: templates write both alike, but some fail on
    nothing. Parts are joined without anything between them, as templates that take parts do.
    """
    if content is None and has_calls:
        return ""
    if isinstance(content, list):
        parts = [_part(place, f"part {n} of {name}", p) for n, p in enumerate(content, start=1)]
        return "".join(parts)
    if content is None:
        raise DataError(f"{place}: {name} has no content and no tool calls")
    check_text(place, f"content of {name}", content)
    return str(content)


def _part(place: str, name: str, part: Any) -> str:
    if not isinstance(part, dict):
        raise DataError(f"{place}: {name} must be an object with type and text")
    part = without_nulls(part)
    if part.get("type") != "text":
        kind = shorten(part.get("type"))
        raise DataError(f"{place}: {name} has type {kind}, but only text is trained on")
    check_keys(place, part, ("type", "text"), owner=name)
    check_text(place, f"text of {name}", part.get("text"))
    return str(part["text"])


def _extras(place: str, name: str, role: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return name, the answered call's id and the reasoning, where given."""
    extras = {key: given[key] for key in ("name", "tool_call_id", *REASONING) if key in given}
    for key, value in extras.items():
        check_text(place, f"{key} of {name}", value)
    extras = {key: value for key, value in extras.items() if value}
    if "tool_call_id" in extras:
        _check_role(place, f"tool_call_id of {name}", role, "tool")
    reasoning = {key: extras[key] for key in REASONING if key in extras}
    if not reasoning:
        # Templates may look for reasoning within the content, unless it is said to be empty.
        is_said = any(key in given for key in REASONING) and role == ASSISTANT
        return {**extras, REASONING[0]: ""} if is_said else extras
    _check_role(place, f"{next(iter(reasoning))} of {name}", role, ASSISTANT)
    if len(set(reasoning.values())) > 1:
        raise DataError(f"{place}: {' and '.join(reasoning)} of {name} differ; drop all but one")
    return {**extras, REASONING[0]: next(iter(reasoning.values()))}


def _check_role(place: str, what: str, role: str, wanted: str) -> None:
    if role != wanted and not (wanted == "tool" and role in TEMPLATE_ROLES):
        raise DataError(f"{place}: {what}: only for the role {wanted}, this one is {role}")


def _is_learned(place: str, name: str, role: str, given: Mapping[str, Any]) -> bool:
    """Say whether a turn is learned, by its role and its `weight`, `train` or `loss`."""
    flags = {key: given[key] for key in FLAGS if key in given}
    for key, value in flags.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(
                f"{place}: {key} of {name} is {shorten(value)}, wanted 0 or 1 (false or true): a "
                "turn is learned or not"
            )
    if len({bool(value) for value in flags.values()}) > 1:
        raise DataError(f"{place}: {' and '.join(flags)} of {name} contradict each other")
    if role != ASSISTANT and any(flags.values()):
        raise DataError(
            f"{place}: {next(iter(flags))} of {name} asks to learn a turn of the role {role}, but "
            "only assistant turns are learned"
        )
    return role == ASSISTANT and all(flags.values())
