"""Errors a user can act on: one sentence each, shown without a traceback, mostly exit code 2.

Anything else that is raised is a defect of ours: it keeps its traceback and ends with exit code 1.
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "MissingKernelError",
    "NonFiniteError",
    "PlacementError",
    "PlanError",
    "UserError",
]


class UserError(Exception):
    """Base of the errors a user can act on.

    The message is one sentence that names the parameter, file or value at fault, the value seen and
    the value wanted. The library names parameters as Python callers write them (`ep_size`); a
    command shows `as_options()`, where they are the options they come from (`--ep_size`).

    Attributes:
        exit_code: of a command that ends with it.
        parameters: names in the message that are parameters of the library.
    """

    exit_code = 2

    def __init__(self, message: str, *, parameters: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.parameters = tuple(parameters)

    def as_options(self, option_names: Mapping[str, str] = MappingProxyType({})) -> str:
        """Return the message with every parameter written as an option.

        Args:
            option_names: options whose name is not that of the parameter, by parameter.
        """
        message = str(self)
        for name in self.parameters:
            option = f"--{option_names.get(name, name)}"
            # Alone, or at the end of a sentence; not within a path or a longer name.
            alone = rf"(?<![\w./-]){re.escape(name)}(?!\w|[./-]\w)"
            message = re.sub(alone, option, message)
        return message


class ConfigurationError(UserError):
    """Report an option, or a combination of options and environment, that cannot work."""


class DataError(UserError):
    """Report a training data file or record that cannot be used."""


class CheckpointError(UserError):
    """Report a model folder or weight file that cannot be used."""


class PlanError(UserError):
    """Report a run that would not fit; the exit code tells it from a mistake."""

    exit_code = 3


class MissingKernelError(UserError):
    """Report a named kernel backend that is not installed, with the line that installs it."""


class NonFiniteError(UserError):
    """Report training that has led to values that are not finite; the input was well-formed."""

    exit_code = 1


class PlacementError(UserError):
    """Report parameters that do not lie on the ranks as declared; the input was well-formed."""

    exit_code = 1
