"""The commands of this package behind one word: `megablocks-utils plan ...`.

The same as `python -m megablocks_utils.plan ...`. Only the called command's code is imported.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from megablocks_utils.config.reader import HelpRequested
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.processes.entry_point import run_entry_point

__all__ = ["COMMANDS", "main", "run"]

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "plan": "what a run will need: memory, traffic and time of each layout, without a GPU",
        "merge": "write a LoRA adapter into its base model",
        "export": "write the model or the adapter of a checkpoint as a Hugging Face folder",
        "evaluate": "measure a saved model on held-out examples",
        "report": "show a finished or running run as one HTML page",
        "tune": "measure the expert kernels on this GPU",
    }
)
"""Name of a command, which is the name of its module -> what it does."""

_HELP = """\
usage: megablocks-utils COMMAND ...

{commands}

megablocks-utils COMMAND --help lists a command's options. python -m megablocks_utils.COMMAND is the
same. Training is not a command: train_accelerate_fsdp2.py and train_fsdp1.py of the project's
repository are started by torchrun and accelerate launch.
"""


def main(argv: Sequence[str]) -> None:
    """Call the command that the first word names with the words after it.

    Raises:
        HelpRequested: for `--help` or `-h`, of all commands or of one.
        UserError: no such command, or whatever the command refuses.
        SystemExit: with a command's own exit code.
    """
    name, *rest = argv or [""]
    if name in ("--help", "-h"):
        raise HelpRequested(_format_help())
    if name not in COMMANDS:
        seen = f"the command is {name}" if name else "no command is given"
        *others, last = COMMANDS
        raise ConfigurationError(f"{seen}, but it must be {', '.join(others)} or {last}.")
    code = importlib.import_module(f"megablocks_utils.{name}").main(rest)
    if code:
        raise SystemExit(code)


def run() -> None:
    """Be the console script."""
    run_entry_point(main, sys.argv[1:])


def _format_help() -> str:
    lines = [f"  {name:<9} {what}" for name, what in COMMANDS.items()]
    return _HELP.format(commands="\n".join(lines))


if __name__ == "__main__":
    run()
