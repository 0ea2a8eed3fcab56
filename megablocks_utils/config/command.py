"""What the command line of a script or command may hold. Torch-free."""

from dataclasses import dataclass

from megablocks_utils.config.option import Option

__all__ = ["CONFIG_FILE_OPTION", "EXIT_CODES", "Command"]

CONFIG_FILE_OPTION = Option(
    "YAML file with any of these options, by name; the command line replaces what it says",
    name="config",
    metavar="FILE.yaml",
    wanted="a YAML file of options",
)
"""An option of every command, and of no configuration: what it names is read in its place."""

EXIT_CODES = (
    "Exit codes: 0 done; 2 a bad option or file, said in one sentence; 1 anything unexpected."
)


@dataclass(frozen=True)
class Command:
    """Say what a command line may hold, and what `--help` tells of it.

    Attributes:
        usage: How it is called, a line each.
        options: Its own options, in the order of the help.
        about: Paragraphs before the options.
        positional: What its words without an option are called; empty where it takes none.
        positional_help: What such a word is.
        closing: Paragraphs after the options.
        run_options: Options of a training run that it takes too and `--help` does not list again.
    """

    usage: tuple[str, ...]
    options: tuple[Option, ...]
    about: tuple[str, ...] = ()
    positional: str = ""
    positional_help: str = ""
    closing: tuple[str, ...] = (EXIT_CODES,)
    run_options: tuple[Option, ...] = ()

    @property
    def all_options(self) -> tuple[Option, ...]:
        """Every option it takes."""
        return (*self.options, CONFIG_FILE_OPTION, *self.run_options)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name and alias of its options."""
        return tuple(name for option in self.all_options for name in option.names)

    def find(self, name: str) -> Option | None:
        """Return the option with this name or alias (without dashes), or None."""
        return next((option for option in self.all_options if name in option.names), None)
