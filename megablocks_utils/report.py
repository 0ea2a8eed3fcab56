"""Turn a run into one HTML page: `python -m megablocks_utils.report --help`.

For a run that is finished or still trains; neither torch nor a network is needed.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megablocks_utils.config.command import Command
from megablocks_utils.config.option import Option, list_options
from megablocks_utils.config.reader import build_section, read_command
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.files import publish_file
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.training.report.run_files import read_run_files
from megablocks_utils.training.report.run_page import GENERATOR, build_page

__all__ = ["COMMAND", "REPORT_NAME", "ReportOptions", "main", "write_report"]

REPORT_NAME = "report.html"
_HEAD_CHARACTERS = 300


@dataclass(frozen=True)
class ReportOptions:
    """Hold the options."""

    output: Annotated[
        Path | None,
        Option(
            "the page to write; only an earlier report is replaced",
            metavar="FILE.html",
            wanted="a file",
            shown_default=f"{REPORT_NAME} in the run's folder",
        ),
    ] = None


COMMAND = Command(
    usage=("python -m megablocks_utils.report RUN [--output FILE.html]",),
    about=(
        "Shows losses, gradient norms, speed, the loads of experts, the memory plan beside what "
        "was measured, held-out answers and options of a run in one HTML file. It refers to "
        "nothing outside itself. A run that still trains has what it has written so far.",
    ),
    options=list_options(ReportOptions),
    positional="RUN",
    positional_help="the output folder of the run",
)


def main(argv: Sequence[str]) -> None:
    """Write the page, and a line that says where.

    Raises:
        HelpRequested: for `--help` or `-h`.
        UserError: for options or files that cannot be used.
    """
    values, line = read_command(argv, COMMAND)
    options = build_section(ReportOptions, values)
    words = line.positional
    if len(words) != 1:
        seen = ", ".join(words) or "none"
        raise ConfigurationError(f"RUN must be one output folder of a run, but it is {seen}.")
    sys.stdout.write(f"{write_report(Path(words[0]), options.output)}\n")


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of the run in `folder` and return where it is.

    Raises:
        ConfigurationError: for a folder without a run, or a file that is no report in the way.
    """
    path = folder / REPORT_NAME if output is None else output
    run = read_run_files(folder)
    _check_replaceable(path)
    page = build_page(run)
    try:
        with publish_file(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror}).") from error
    return path


def _check_replaceable(path: Path) -> None:
    """Refuse to replace what is no report of ours; streams and new files are written."""
    if not path.is_file():
        if path.is_dir():
            raise ConfigurationError(
                f"--output is {path}, but that is a folder; it must be a file."
            )
        return
    with path.open(encoding="utf-8", errors="replace") as stream:
        head = stream.read(_HEAD_CHARACTERS)
    if GENERATOR not in head:
        raise ConfigurationError(
            f"{path} exists and is no report of a run; move it away, or choose another --output."
        )


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
