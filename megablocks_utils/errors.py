"""Errors a user can act on: one sentence each, shown without a traceback, exit code 2.

Anything else that is raised is a defect of ours: it keeps its traceback and ends with exit code 1.
"""

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "MissingKernelError",
    "PlanError",
    "UserError",
]


class UserError(Exception):
    """Base of the errors a user can act on.

    The message is one sentence that names the option, file or value at fault, the value seen and
    the value wanted.
    """

    exit_code = 2


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
