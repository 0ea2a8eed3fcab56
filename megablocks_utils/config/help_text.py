"""Turn options into the text of `--help` and into the table of `docs/options.md`. Torch-free."""

import textwrap
from collections.abc import Sequence

from megablocks_utils.config.command import CONFIG_FILE_OPTION, Command
from megablocks_utils.config.option import Option

__all__ = ["format_help", "format_options_table"]

_WIDTH = 96
_METAVARS = {"boolean": "{True|False}", "integer": "N", "number": "X", "path": "PATH"}
_METAVARS |= {"numbers": "X ..."}


def format_help(command: Command) -> str:
    """Return the text that `--help` prints for a command."""
    first, *others = command.usage
    lines = [f"usage: {first}", *(f"       {line}" for line in others), ""]
    for paragraph in command.about:
        lines += [*textwrap.wrap(paragraph, _WIDTH), ""]
    if command.positional:
        lines += [f"  {command.positional}", *_wrap(_sentence(command.positional_help))]
    for option in (*command.options, CONFIG_FILE_OPTION):
        lines += _format_option(option)
    for paragraph in command.closing:
        lines += ["", *textwrap.wrap(paragraph, _WIDTH)]
    return "\n".join(lines) + "\n"


def format_options_table(options: Sequence[Option]) -> str:
    """Return the Markdown table of options that `docs/options.md` holds."""
    rows = ["| option | values | default | meaning |", "|---|---|---|---|"]
    for option in (*options, CONFIG_FILE_OPTION):
        names = ", ".join(f"`--{name}`" for name in option.names)
        values = _metavar(option).replace("|", "\\|")
        rows.append(f"| {names} | {values} | {_default(option)} | {_sentence(option.help)} |")
    return "\n".join(rows) + "\n"


def _format_option(option: Option) -> list[str]:
    metavar = _metavar(option)
    first = f"  {', '.join(f'--{name}' for name in option.names)} "
    fits = len(first + metavar) <= _WIDTH
    lines = [first + (metavar if fits else "NAME"), *_wrap(_sentence(option.help))]
    lines += [] if fits else _wrap(f"One of {', '.join(option.choices)}.")
    if option.is_required:
        return [*lines, *_wrap("Required.")]
    return [*lines, *_wrap(f"Default: {_default(option)}.")]


def _metavar(option: Option) -> str:
    if option.metavar is not None:
        return option.metavar
    if option.choices:
        return "{" + "|".join(option.choices) + "}"
    return _METAVARS.get(option.kind, "TEXT")


def _default(option: Option) -> str:
    if option.shown_default is not None:
        return option.shown_default
    if isinstance(option.default, tuple):
        return ", ".join(option.default) or "none"
    if option.default is None:
        return "not set"
    given = {value: word for word, value in option.translation.items()}
    return given.get(str(option.default), str(option.default))


def _sentence(text: str) -> str:
    """Return a help line with a full stop; a word that is a value keeps its letters."""
    first = text.split()[0]
    return (text if first.endswith(":") else text[0].upper() + text[1:]) + "."


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
