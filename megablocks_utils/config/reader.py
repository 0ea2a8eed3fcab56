"""Read a command line and the file of options it names, by the options of a command. Torch-free.

One reader for the scripts and all commands. Every error is one sentence naming the option, the
value seen and the value wanted.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from megablocks_utils.config.command import CONFIG_FILE_OPTION, Command
from megablocks_utils.config.given import CommandLine, GivenOption, option_name
from megablocks_utils.config.help_text import format_help
from megablocks_utils.config.hints import unknown_option
from megablocks_utils.config.option import Option, OptionSection
from megablocks_utils.config.secrets import is_secret_name
from megablocks_utils.config.values import describe_wanted, join_words
from megablocks_utils.config.yaml_file import FileEntry, read_options_file
from megablocks_utils.errors import ConfigurationError

__all__ = [
    "HelpRequested",
    "build_section",
    "check_required",
    "choose_model",
    "read_command",
    "refuse_unknown",
    "scan_words",
]

_Section = TypeVar("_Section", bound=OptionSection)


class HelpRequested(Exception):
    """Ask `run_entry_point` to print this help text and end with exit code 0."""


def read_command(argv: Sequence[str], command: Command) -> tuple[dict[str, Any], CommandLine]:
    """Read the words of a command that knows all its options.

    Returns:
        The options given, by name; and the line they come from.

    Raises:
        HelpRequested: for `--help` or `-h`.
        ConfigurationError: for a word, name or value that cannot be used, or a required option
            that is missing.
    """
    line = scan_words(argv, command)
    refuse_unknown(line.given, command.names)
    values = line.read_values()
    check_required(values, command.options)
    return values, line


def check_required(values: Mapping[str, Any], options: Iterable[Option]) -> None:
    """Refuse options that are missing.

    Raises:
        ConfigurationError: naming the first of them.
    """
    for option in options:
        if option.is_required and option.name not in values:
            raise ConfigurationError(
                f"--{option.name} is not given, but it must be {describe_wanted(option)}."
            )


def build_section(section: type[_Section], values: Mapping[str, Any]) -> _Section:
    """Build a dataclass from the values of its fields, defaults where there is none."""
    names = [field.name for field in dataclasses.fields(section) if field.name in values]
    return section(**{name: values[name] for name in names})


def choose_model(line: CommandLine) -> str:
    """Return the MODEL of a command line, which `--model_name_or_path` may name too.

    As every word of a command line, it wins over a file of options.

    Raises:
        ConfigurationError: for none, or more than one.
    """
    models = list(line.positional)
    named = [given for given in line.given if given.name == "model_name_or_path"]
    for given in named:
        value = given.read()
        if value is not None and models != [value] and not (models and given.place):
            models.append(str(value))
    if not models:
        raise ConfigurationError("MODEL is not given, but it must be a local folder or a Hub name.")
    if len(models) > 1:
        raise ConfigurationError(
            f"two models given: {models[0]} and {models[1]}; give one, and options as --name value."
        )
    return models[0]


def scan_words(argv: Sequence[str], command: Command) -> CommandLine:
    """Tell options, their values and positional words apart; a file of options is read too.

    A boolean without a value means True, as in Hugging Face's scripts. What the command line says
    replaces what the file says.

    Raises:
        HelpRequested: for `--help` or `-h`.
        ConfigurationError: for a word that belongs to no option, an option that is given twice, or
            a file that cannot be read.
    """
    positional: list[str] = []
    found: list[GivenOption] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            raise HelpRequested(format_help(command))
        if word.startswith("--") and word != "--":
            found.append(_take_option(word, words, command))
        elif command.positional:
            positional.append(word)
        else:
            raise ConfigurationError(f"{word} is not an option; write options as --name value.")
    typed = _check_repeated(found)
    files = [given for given in typed if given.option is CONFIG_FILE_OPTION]
    written = _check_repeated([line for file in files for line in _read_file(file, command)])
    names = {given.name for given in typed}
    given = [option for option in (*typed, *written) if option not in files]
    return CommandLine(
        tuple(positional),
        tuple(option for option in given if not option.place or option.name not in names),
    )


def refuse_unknown(given: Iterable[GivenOption], known: Collection[str]) -> None:
    """Refuse the options that a command does not know.

    Args:
        given: All options.
        known: Names of those that count as known, aliases included.

    Raises:
        ConfigurationError: naming the first, and what it probably means.
    """
    for option in given:
        if option.option is None and option.name not in known:
            raise option.located(unknown_option(option.flag, known))


def _take_option(word: str, words: list[str], command: Command) -> GivenOption:
    """Take the values of the option `word` from the front of `words`."""
    flag, has_value, inline = word.partition("=")
    option = command.find(option_name(flag))
    if has_value:
        return GivenOption(flag, (inline,), option)
    values: list[str] = []
    takes_one = option is not None and not option.takes_several
    while words and not words[0].startswith("--") and words[0] != "-h":
        if takes_one and values and command.positional:
            break
        values.append(words.pop(0))
    given = GivenOption(flag, tuple(values), option)
    _check_single(given)
    return given


def _read_file(given: GivenOption, command: Command) -> list[GivenOption]:
    """Return the options in the file that `--config` names."""
    entries = read_options_file(str(given.read()))
    return [_from_entry(entry, command) for entry in entries]


def _from_entry(entry: FileEntry, command: Command) -> GivenOption:
    option = command.find(option_name(entry.key))
    given = GivenOption(
        f"--{entry.key}", entry.texts(option), option, entry.place, is_null=entry.is_null
    )
    if option is CONFIG_FILE_OPTION:
        error = ConfigurationError("--config is an option of the command line alone.")
        raise given.located(error)
    _check_single(given)
    return given


def _check_single(given: GivenOption) -> None:
    option = given.option
    takes_one = not option.takes_several if option else is_secret_name(given.name)
    if takes_one and len(given.values) > 1:
        seen = join_words(given.shown_values, "and")
        error = ConfigurationError(f"{given.flag} is {seen}, but it takes one value.")
        raise given.located(error)


def _check_repeated(found: Iterable[GivenOption]) -> list[GivenOption]:
    """Refuse what is given twice; add up the values of what may be."""
    by_name: dict[str, GivenOption] = {}
    for given in found:
        before = by_name.get(given.name)
        if before is None:
            by_name[given.name] = given
        elif given.option is not None and given.option.may_repeat:
            values = (*before.values, *given.values)
            by_name[given.name] = dataclasses.replace(before, values=values)
        else:
            raise given.located(_describe_repetition(before, given))
    return list(by_name.values())


def _describe_repetition(before: GivenOption, given: GivenOption) -> ConfigurationError:
    first, second = (" ".join(option.shown_values) or "no value" for option in (before, given))
    if option_name(before.flag) != option_name(given.flag):
        return ConfigurationError(
            f"{before.flag} {first} and {given.flag} {second} are the same option given twice; "
            "leave one of the two out."
        )
    return ConfigurationError(
        f"{given.flag} is given twice, as {first} and as {second}; give it once."
    )
