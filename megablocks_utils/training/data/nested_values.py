"""Check and clean what a record hands to a chat template: JSON values of any depth."""

import math
from typing import Any

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.arrow_rows import JsonObject, as_json_objects
from megablocks_utils.training.data.json_reader import decode_json
from megablocks_utils.training.data.text import check_text

__all__ = ["check_value", "decode_text", "without_nulls"]

MAX_DEPTH = 100


def check_value(place: str, name: str, value: Any, depth: int = 0) -> None:
    """Raise DataError unless a value is JSON that a template can write and a tokenizer can take.

    That leaves out half surrogate pairs in texts and keys, numbers that are not finite, types
    that JSON has not, and nesting beyond 100.
    """
    if isinstance(value, str):
        check_text(place, name, value)
    elif isinstance(value, dict | list) and depth == MAX_DEPTH:
        raise DataError(f"{place}: {name} is nested more than {MAX_DEPTH} deep")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(place, f"a key in {name}", key)
            check_value(place, name, item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_value(place, name, item, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{place}: {name} holds a number that is not finite")
    elif value is not None and not isinstance(value, bool | int | float):
        raise DataError(
            f"{place}: {name} holds a value of type {type(value).__name__}, wanted JSON's types"
        )


def without_nulls(value: Any) -> Any:
    """Return a value of a typed table without the keys whose value is null, at any depth.

    There all objects of a column have the keys of every one of them. Objects that were read from
    JSON text have their own keys and stay as they are.
    """
    if isinstance(value, JsonObject):
        return value
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def decode_text(place: str, name: str, value: Any) -> Any:
    """Return what a JSON text says, and any other value as it is."""
    if not isinstance(value, str):
        return value
    decoded = decode_json(value, f"{place}: {name} as JSON text")
    check_value(place, name, decoded)
    return as_json_objects(decoded)
