"""Turn the text given for an option into its value, and say what it must be. Torch-free.

Every error is one sentence with the option, the value seen and the value wanted.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from megablocks_utils.config.option import Option
from megablocks_utils.errors import ConfigurationError

__all__ = ["convert_value", "describe_wanted", "join_words", "parse_duration", "read_value"]

_WANTED = {
    "integer": "a whole number",
    "number": "a number",
    "numbers": "a number",
    "boolean": "True or False",
    "texts": "a text",
    "duration": "a time of at most a year, such as 3h50m, 90m, 45s, 03:50:00 or 1-03:50:00",
}
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_DURATION = re.compile(
    r"(?:(?P<days>[0-9]{1,4})d)?(?:(?P<hours>[0-9]{1,6})h)?(?:(?P<minutes>[0-9]{1,6})m)?"
    r"(?:(?P<seconds>[0-9]{1,9})s)?"
)
_CLOCK = re.compile(
    r"(?:(?P<days>[0-9]{1,4})-)?(?P<hours>[0-9]{1,4}):(?P<minutes>[0-5]?[0-9])"
    r":(?P<seconds>[0-5]?[0-9])"
)
_UNIT_S = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
_MAX_DURATION_S = 366 * 86400
_MAX_DIGITS = 18  # what 64 bits can hold, and no option needs
_SHOWN_DIGITS = 40


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
    if any("\0" in value for value in values):
        raise ConfigurationError(f"{flag} holds a NUL character, but it must be text without one.")
    if not all(_is_text(value) for value in values):
        raise ConfigurationError(f"{flag} holds bytes that are not UTF-8, but it must be text.")
    if option.kind in ("texts", "numbers"):
        return tuple(convert_value(option, flag, value) for value in values)
    if option.kind == "words":
        parts = [part for value in values for part in value.replace(",", " ").split()]
        return tuple(convert_value(option, flag, part) for part in parts or [""])
    return convert_value(option, flag, values[0])


def _is_text(value: str) -> bool:
    """Say whether a word is text; Python keeps other bytes of a command line as surrogates."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def convert_value(option: Option, flag: str, text: str) -> object:
    """Turn one text given for an option into a value.

    Raises:
        ConfigurationError: naming the flag, the text and what it must be.
    """
    error = ConfigurationError(
        f"{flag} is {text or 'empty'}, but it must be {describe_wanted(option)}."
    )
    if text in option.refused:
        wanted = describe_wanted(option)
        raise ConfigurationError(
            f"{flag} is {text}, but {option.refused[text]}: it must be {wanted}."
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
    if option.kind in ("integer", "number", "numbers"):
        return _convert_number(option, flag, text)
    if option.kind == "duration":
        if parse_duration(text) is None:
            raise error
        return text
    if not text:
        raise error
    return Path(text) if option.kind == "path" else text


def parse_duration(text: str) -> float | None:
    """Return the seconds of a time such as 3h50m or D-HH:MM:SS; None for any other text."""
    match = _DURATION.fullmatch(text) or _CLOCK.fullmatch(text)
    if match is None:
        return None
    seconds = sum(int(match[unit] or 0) * length for unit, length in _UNIT_S.items())
    return float(seconds) if 0 < seconds <= _MAX_DURATION_S else None


def _convert_number(option: Option, flag: str, text: str) -> int | float:
    shown = text if len(text) <= _SHOWN_DIGITS else f"{text[:_SHOWN_DIGITS]}..."
    error = ConfigurationError(
        f"{flag} is {shown or 'empty'}, but it must be {describe_wanted(option)}."
    )
    number = _parse_number(option, text)
    if number is None:
        raise error
    too_small = option.minimum is not None and number < option.minimum
    not_above = option.above is not None and number <= option.above
    if too_small or not_above:
        raise error
    largest = option.largest
    if largest is not None and number > largest:
        if option.maximum is not None:
            raise error
        raise ConfigurationError(f"{flag} is {shown}, but it must be at most {largest:.12g}.")
    return number


def _parse_number(option: Option, text: str) -> int | float | None:
    """Return the number that a text is; one that is too long is infinite, not computed."""
    if option.kind == "integer":
        if not _INTEGER.fullmatch(text):
            return None
        digits = text.lstrip("+-").lstrip("0") or "0"
        sign = -1 if text.startswith("-") else 1
        return sign * (int(digits) if len(digits) <= _MAX_DIGITS else math.inf)
    if not _NUMBER.fullmatch(text):
        return None
    number = float(text)
    # Smaller than any float, it would silently become 0.
    vanishes = number == 0 and re.search("[1-9]", text.lower().partition("e")[0])
    return None if vanishes else number


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
