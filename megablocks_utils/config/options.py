"""The one table of options: what parsing, `--help`, `docs/options.md` and the defaults come from.

Torch-free. An option is a row of `OPTIONS`, written in the module of its topic.
"""

from megablocks_utils.config.option import Option
from megablocks_utils.config.options_model import MODEL_OPTIONS
from megablocks_utils.config.options_output import OUTPUT_OPTIONS
from megablocks_utils.config.options_training import TRAINING_OPTIONS

__all__ = ["OPTIONS", "default_of", "find_option"]

OPTIONS: tuple[Option, ...] = (*MODEL_OPTIONS, *TRAINING_OPTIONS, *OUTPUT_OPTIONS)

_BY_NAME = {name: option for option in OPTIONS for name in (option.name, *option.aliases)}


def find_option(name: str) -> Option | None:
    """Return the option with this name or alias (without dashes), or None."""
    return _BY_NAME.get(name)


def default_of(name: str) -> object:
    """Return the default of an option: the dataclasses of `config` take theirs from here."""
    return _BY_NAME[name].default
