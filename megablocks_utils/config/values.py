"""Turn the text given for an option into its value, and say what it must be. Torch-free.

Every error is one sentence with the option, the value seen and the value wanted.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from megablocks_utils.config.option import Option
from megablocks_utils.errors import ConfigurationError

__all__ = ["convert_value", "describe_wanted", "join_words", "read_value"]

_WANTED = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "True or False",
    "texts": "a text",
}
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_MAX_DIGITS = 18
"""Digits of a whole number that 64 bits can hold."""


def read_value(
    option: Option, flag: str, values: Sequence[str], *, is_null: bool = False
) -> object:
    """Turn all that was given for an option into its value.

    Args:
        option: The option.
        flag: Its name as it was written, for the message.
        values: The words after it.
        is_null: Whether a file says null, which is no value for a boolean either.

    Raises:
        ConfigurationError: naming the flag, what was seen and what it must be.
    """
    if not values and option.is_switch and not is_null:
        values = ["True"]
    if not values:
        raise ConfigurationError(f"{flag} has no value, but it must be {describe_wanted(option)}.")
    if option.kind == "texts":
        return tuple(convert_value(option, flag, value) for value in values)
    if option.kind == "words":
        parts = [part for value in values for part in value.replace(",", " ").split()]
        return tuple(convert_value(option, flag, part) for part in parts or [""])
    return convert_value(option, flag, values[0])


def convert_value(option: Option, flag: str, text: str) -> object:
    """Turn one text given for an option into a value.

    Raises:
        ConfigurationError: naming the flag, the text and what it must be.
    """
    error = ConfigurationError(
        f"{flag} is {text or 'empty'}, but it must be {describe_wanted(option)}."
    )
    if option.choices:
        choices = {choice.lower(): choice for choice in option.choices}
        choice = choices.get(text.lower() if "True" in option.choices else text)
        if choice is None:
            raise error
        return option.translation.get(choice, choice)
    if option.kind == "boolean":
        if text.lower() not in ("true", "false"):
            raise error
        return text.lower() == "true"
    if option.kind in ("integer", "number"):
        return _convert_number(option, text, error)
    if not text:
        raise error
    return Path(text) if option.kind == "path" else text


def _convert_number(option: Option, text: str, error: ConfigurationError) -> int | float:
    number: int | float
    if option.kind == "integer":
        if not _INTEGER.fullmatch(text):
            raise error
        if len(text) > _MAX_DIGITS:
            raise ConfigurationError(f"{str(error)[:-1]}, of at most {_MAX_DIGITS} digits.")
        number = int(text)
    else:
        if not _NUMBER.fullmatch(text):
            raise error
        number = float(text)
    too_small = option.minimum is not None and number < option.minimum
    too_large = option.maximum is not None and number > option.maximum
    not_above = option.above is not None and number <= option.above
    if not math.isfinite(number) or too_small or too_large or not_above:
        raise error
    return number


def describe_wanted(option: Option) -> str:
    """Say what the value of an option must be."""
    if option.wanted is not None:
        return option.wanted
    if option.choices:
        return join_words(option.choices)
    wanted = _WANTED.get(option.kind, "a name or path")
    if option.above is not None:
        return f"{wanted} above {option.above}"
    if option.maximum is not None:
        return f"{wanted} from {option.minimum} to {option.maximum}"
    return wanted if option.minimum is None else f"{wanted} of at least {option.minimum}"


def join_words(words: Sequence[object], last: str = "or") -> str:
    """Join words as in a sentence: `a, b or c`."""
    texts = [str(word) for word in words]
    return f" {last} ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
