"""Turn command-line words into values by the table of options, and the table into help text.

Torch-free. Every error is one sentence naming the option, the value seen and the value wanted.
"""

import difflib
import math
import textwrap
from collections.abc import Collection, Sequence

from megablocks_utils.config.option import Option
from megablocks_utils.config.options import OPTIONS, find_option
from megablocks_utils.errors import ConfigurationError

__all__ = [
    "HelpRequested",
    "check_leftovers",
    "check_no_dtype_flags",
    "convert_value",
    "describe_wanted",
    "format_help",
    "format_options_table",
    "join_words",
    "read_arguments",
]

_HELP_WIDTH = 96
_WANTED = {"integer": "a whole number", "number": "a number", "boolean": "True or False"}


class HelpRequested(Exception):
    """Ask `run_entry_point` to print this help text and end with exit code 0."""


def read_arguments(
    argv: Sequence[str], entry_point: str, *, keep_unknown: bool
) -> tuple[dict[str, object], list[str]]:
    """Read `--name value` and `--name=value` words.

    A boolean without a value means True, as in Hugging Face's scripts. The last of several values
    for one option counts.

    Returns:
        The options given, by name; and the words for Hugging Face's TrainingArguments (empty
        unless `keep_unknown`).

    Raises:
        HelpRequested: for `--help` or `-h`.
        ConfigurationError: for a word, name or value that cannot be used.
    """
    given: dict[str, object] = {}
    leftovers: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            raise HelpRequested(format_help(entry_point))
        if not word.startswith("--") or word == "--":
            raise ConfigurationError(f"{word} is not an option; write options as --name value.")
        flag, has_value, inline = word.partition("=")
        values = [inline] if has_value else _take_values(words)
        option = find_option(_name(flag))
        if option is None or entry_point in option.passed_on:
            if option is None and not keep_unknown:
                raise _unknown_option(flag, _known_names(entry_point))
            leftovers += [f"--{option.name}" if option else flag, *values]
            continue
        if option.kind != "words" and len(values) > 1:
            words[:0], values = values[1:], values[:1]
        given[option.name] = _read_value(option, flag, values)
    return given, leftovers


def check_leftovers(leftovers: Sequence[str], trainer_names: Collection[str]) -> None:
    """Refuse words left for TrainingArguments that it does not know either.

    Args:
        leftovers: What `config.parse_known_args` returned second.
        trainer_names: Names of TrainingArguments' fields, without dashes.

    Raises:
        ConfigurationError: naming the unknown option and the nearest known one.
    """
    known = {*_known_names("fsdp1"), *trainer_names}
    for word in leftovers:
        flag = word.partition("=")[0]
        if flag.startswith("--") and _name(flag) not in known:
            raise _unknown_option(flag, known)


def check_no_dtype_flags(leftovers: Sequence[str]) -> None:
    """Refuse Hugging Face's `--bf16` and `--fp16`: here the dtypes come from `--precision` alone.

    Raises:
        ConfigurationError: naming the flag and `--precision`.
    """
    for position, word in enumerate(leftovers):
        flag, has_value, value = word.partition("=")
        following = leftovers[position + 1 : position + 2]
        value = value if has_value else "".join(following)
        if flag in ("--bf16", "--fp16") and value.lower() != "false":
            raise ConfigurationError(
                f"{flag} is given, but dtypes come from --precision; use --precision fp32, mixed, "
                "bf16_sr or bf16."
            )


def format_help(entry_point: str) -> str:
    """Return the text that `--help` prints for an entry point."""
    script = {"fsdp1": "train_fsdp1.py", "fsdp2": "train_accelerate_fsdp2.py"}[entry_point]
    lines = [f"usage: {script} [--option value | --option=value] ...", ""]
    for option in OPTIONS:
        names = ", ".join(f"--{name}" for name in (option.name, *option.aliases))
        values, first = _values_text(option), f"  {names} "
        fits = len(first + values) <= _HELP_WIDTH
        lines += [first + values if fits else first + "NAME", *_wrap(option.help)]
        lines += [] if fits else _wrap(f"One of {', '.join(option.choices)}.")
        lines += _wrap(f"Default: {_default_text(option)}.")
    if entry_point == "fsdp1":
        lines += ["", "All other options of transformers.TrainingArguments are taken too."]
    return "\n".join(lines) + "\n"


def format_options_table() -> str:
    """Return the Markdown table of all options that `docs/options.md` holds."""
    rows = ["| option | values | default | meaning |", "|---|---|---|---|"]
    for option in OPTIONS:
        names = ", ".join(f"`--{name}`" for name in (option.name, *option.aliases))
        meaning = option.help[0].upper() + option.help[1:] + "."
        values = _values_text(option).replace("|", "\\|")
        rows.append(f"| {names} | {values} | {_default_text(option)} | {meaning} |")
    return "\n".join(rows) + "\n"


def join_words(words: Sequence[object], last: str = "or") -> str:
    """Join words as in a sentence: `a, b or c`."""
    texts = [str(word) for word in words]
    return f" {last} ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _take_values(words: list[str]) -> list[str]:
    values = []
    while words and not words[0].startswith("--") and words[0] != "-h":
        values.append(words.pop(0))
    return values


def _known_names(entry_point: str) -> list[str]:
    rows = [option for option in OPTIONS if entry_point not in option.passed_on]
    return [name for option in rows for name in (option.name, *option.aliases)]


def _unknown_option(flag: str, known: Collection[str]) -> ConfigurationError:
    nearest = difflib.get_close_matches(_name(flag), sorted(known), n=1, cutoff=0.0)[0]
    return ConfigurationError(f"unknown option {flag}; did you mean --{nearest}?")


def _read_value(option: Option, flag: str, values: list[str]) -> object:
    if not values and (option.kind == "boolean" or "True" in option.choices):
        values = ["True"]
    if not values:
        raise ConfigurationError(f"{flag} has no value, but it must be {describe_wanted(option)}.")
    if option.kind == "words":
        parts = [part for value in values for part in value.replace(",", " ").split()]
        return tuple(convert_value(option, flag, part) for part in parts or [""])
    return convert_value(option, flag, values[0])


def convert_value(option: Option, flag: str, text: str) -> object:
    """Turn the text given for an option into its value.

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
        return choice
    if option.kind == "boolean":
        if text.lower() not in ("true", "false"):
            raise error
        return text.lower() == "true"
    if option.kind in ("integer", "number"):
        return _convert_number(option, text, error)
    if not text:
        raise error
    return text


def _convert_number(option: Option, text: str, error: ConfigurationError) -> int | float:
    try:
        number = int(text) if option.kind == "integer" else float(text)
    except ValueError:
        raise error from None
    too_small = option.minimum is not None and number < option.minimum
    too_large = option.maximum is not None and number > option.maximum
    not_above = option.above is not None and number <= option.above
    if not math.isfinite(number) or too_small or too_large or not_above:
        raise error
    return number


def describe_wanted(option: Option) -> str:
    """Say what the value of an option must be."""
    if option.choices:
        return join_words(option.choices)
    wanted = _WANTED.get(option.kind, "a name or path")
    if option.above is not None:
        return f"{wanted} above {option.above}"
    if option.maximum is not None:
        return f"{wanted} from {option.minimum} to {option.maximum}"
    return wanted if option.minimum is None else f"{wanted} of at least {option.minimum}"


def _values_text(option: Option) -> str:
    if option.choices:
        return "{" + "|".join(option.choices) + "}"
    return {"boolean": "{True|False}", "integer": "N", "number": "X"}.get(option.kind, "TEXT")


def _default_text(option: Option) -> str:
    if option.shown_default is not None:
        return option.shown_default
    if isinstance(option.default, tuple):
        return ", ".join(option.default)
    return "not set" if option.default is None else str(option.default)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, _HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
