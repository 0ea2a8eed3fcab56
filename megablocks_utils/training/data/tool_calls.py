"""Bring tools and calls of them into the one form that every chat template reads.

Records hold them as OpenAI writes them, ``{"type": "function", "function": {...}}``, or flat,
``{"name": ...}``; as objects or as JSON text. Templates get OpenAI's form with objects: of the
templates of current models none fails on it for being that, and many fail on the others.
"""

from collections.abc import Mapping
from typing import Any

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.nested_values import check_value, decode_text, without_nulls
from megablocks_utils.training.data.record_keys import check_keys, is_absent, shorten
from megablocks_utils.training.data.text import check_text

__all__ = ["read_tool_calls", "read_tools"]


def read_tools(
    place: str, columns: Mapping[str, Any], *, pads_with_nulls: bool
) -> list[dict[str, Any]] | None:
    """Return the tools of a record (`tools`, or OpenAI's older `functions`); None without.

    Raises:
        DataError: they are no list of function descriptions, or both are given.
    """
    given = [key for key in ("tools", "functions") if not is_absent(columns.get(key))]
    if not given:
        return None
    if len(given) == 2:
        raise DataError(f"{place}: tools and functions are both given; drop functions")
    items = _read_list(place, given[0], columns[given[0]])
    tools = [_read_tool(place, f"tool {n}", item) for n, item in enumerate(items, start=1)]
    check_value(place, given[0], tools)
    return (without_nulls(tools) if pads_with_nulls else tools) or None


def read_tool_calls(
    place: str, name: str, value: Any, *, pads_with_nulls: bool
) -> list[dict[str, Any]]:
    """Return the calls of one assistant turn.

    Args:
        place: where the record was read.
        name: what messages call the list, such as ``tool_calls of message 2``.
        value: a list of calls, or one call.
        pads_with_nulls: whether nulls within arguments stand for keys that are not there.

    Raises:
        DataError: a call without name, or whose arguments are no object.
    """
    items = _read_list(place, name, [value] if isinstance(value, dict) else value)
    named = [(f"call {n} in {name}", item) for n, item in enumerate(items, start=1)]
    return [_read_call(place, label, item, pads_with_nulls) for label, item in named]


def _read_list(place: str, name: str, value: Any) -> list[Any]:
    items = decode_text(place, name, value)
    if isinstance(items, dict):
        items = [items]
    if not isinstance(items, list):
        raise DataError(f"{place}: {name} must be a list of objects, this is {shorten(value)}")
    return items


def _read_object(place: str, name: str, value: Any) -> dict[str, Any]:
    item = decode_text(place, name, value)
    if not isinstance(item, dict):
        raise DataError(f"{place}: {name} must be an object, this is {shorten(value)}")
    return item


def _read_function(place: str, name: str, item: dict[str, Any]) -> dict[str, Any]:
    """Return the inner object of OpenAI's form, or a flat one as it is."""
    if is_absent(item.get("function")):
        function = item
    else:
        if item.get("type") not in (None, "function"):
            raise DataError(f"{place}: {name} has type {shorten(item['type'])}, wanted 'function'")
        function = _read_object(place, f"function of {name}", item["function"])
    check_text(place, f"name of {name}", function.get("name"))
    return function


def _read_tool(place: str, name: str, value: Any) -> dict[str, Any]:
    item = _read_object(place, name, value)
    function = _read_function(place, name, item)
    if function is not item:
        return {**item, "type": "function", "function": function}
    if item.get("type") not in (None, "function"):
        raise DataError(f"{place}: {name} has type {shorten(item['type'])}, wanted 'function'")
    return {"type": "function", "function": {k: v for k, v in item.items() if k != "type"}}


def _read_call(place: str, name: str, value: Any, pads_with_nulls: bool) -> dict[str, Any]:
    item = _read_object(place, name, value)
    function = _read_function(place, name, item)
    outer = ("id", "type", "function", "index")
    if function is item:
        check_keys(place, item, ("name", "arguments", *outer), owner=name)
    else:
        check_keys(place, item, outer, owner=name)
        check_keys(place, function, ("name", "arguments"), owner=f"function of {name}")
    arguments = _read_arguments(place, name, function.get("arguments"), pads_with_nulls)
    call: dict[str, Any] = {"type": "function"}
    if item.get("id") is not None:
        check_text(place, f"id of {name}", item["id"])
        call["id"] = item["id"]
    return {**call, "function": {"name": function["name"], "arguments": arguments}}


def _read_arguments(place: str, name: str, value: Any, pads_with_nulls: bool) -> dict[str, Any]:
    if value is None and pads_with_nulls:
        return {}
    arguments = decode_text(place, f"arguments of {name}", value)
    if not isinstance(arguments, dict):
        raise DataError(
            f"{place}: arguments of {name} must be an object or the JSON text of one, this is "
            f"{shorten(value)}"
        )
    check_value(place, f"arguments of {name}", arguments)
    return without_nulls(arguments) if pads_with_nulls else dict(arguments)
