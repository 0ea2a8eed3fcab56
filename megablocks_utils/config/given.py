"""Options as they were given, before their values are read. Torch-free."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from megablocks_utils.config.option import Option
from megablocks_utils.config.secrets import REDACTED, is_secret_name, redact_text
from megablocks_utils.config.values import read_value
from megablocks_utils.errors import ConfigurationError

__all__ = ["CommandLine", "GivenOption", "option_name", "split_line"]


@dataclass(frozen=True)
class GivenOption:
    """Hold an option as it was given.

    Attributes:
        flag: Its name as it was written, with dashes.
        values: The words after it.
        option: What it is; None where the command does not know it.
        place: File and line; empty for the command line.
        is_null: Whether a file says null: as if it were not given.
    """

    flag: str
    values: tuple[str, ...]
    option: Option | None
    place: str = ""
    is_null: bool = False

    @property
    def name(self) -> str:
        """The option's name; of an unknown one, as it was written."""
        return self.option.name if self.option else option_name(self.flag)

    @property
    def shown_values(self) -> tuple[str, ...]:
        """The values as messages and records show them."""
        is_secret = is_secret_name(self.name)
        return tuple(REDACTED if is_secret else redact_text(value) for value in self.values)

    def words(self) -> list[str]:
        """Return it as words of a command line."""
        if self.is_null:
            return []
        flag = f"--{self.name}"
        if len(self.values) == 1 and self.values[0].startswith("-"):
            return [f"{flag}={self.values[0]}"]
        return [flag, *self.values]

    def located(self, error: ConfigurationError) -> ConfigurationError:
        """Return an error with file and line, where it comes from a file."""
        return ConfigurationError(f"{self.place}: {error}") if self.place else error

    def read(self) -> object:
        """Return the value.

        Raises:
            ConfigurationError: for one that cannot be used.
        """
        assert self.option is not None
        if self.is_null and self.option.default is None:
            return None
        try:
            return read_value(self.option, self.flag, self.values, is_null=self.is_null)
        except ConfigurationError as error:
            raise self.located(error) from None


@dataclass(frozen=True)
class CommandLine:
    """Hold what was given, by the command line and the file of options together.

    Attributes:
        positional: Words that belong to no option.
        given: Every option once, in the order of the command line and then of the file.
    """

    positional: tuple[str, ...]
    given: tuple[GivenOption, ...]

    def read_values(self) -> dict[str, Any]:
        """Return the values of all known options, by name."""
        known = [given for given in self.given if given.option is not None]
        values = {given.name: given.read() for given in known}
        return {name: value for name, value in values.items() if value is not None}


def split_line(line: CommandLine, own: Collection[Option]) -> tuple[CommandLine, CommandLine]:
    """Tell a command's own options from MODEL and the options of a run."""
    mine = tuple(given for given in line.given if given.option in own)
    others = tuple(given for given in line.given if given.option not in own)
    return CommandLine((), mine), CommandLine(line.positional, others)


def option_name(flag: str) -> str:
    """Return the name of an option as it is written with dashes, or as a key of a file."""
    return flag.removeprefix("--").replace("-", "_")
