"""What the tools beside training share: options, output folder, progress.

Torch-free, so that `--help` and bad options answer at once.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from megablocks_utils.config.reader import HelpRequested
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.files import STAGING_FOLDER_NAME

__all__ = ["check_output", "read_words", "removed_on_error", "show_progress"]


def read_words(
    argv: Sequence[str],
    names: Sequence[str],
    *,
    required: Sequence[str],
    help_text: str,
    wanted: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """Read `--name value` and `--name=value` words; the last of several values counts.

    Args:
        argv: the words.
        names: of all options.
        required: of those that must be given.
        help_text: what `--help` shows.
        wanted: by name, what a value must be where it is no folder.

    Raises:
        HelpRequested: for `--help` or `-h`.
        ConfigurationError: for a word or name that is not known, or a value that is missing.
    """
    given: dict[str, str] = {}
    words = list(argv)
    while words:
        flag, has_value, value = words.pop(0).partition("=")
        if flag in ("--help", "-h"):
            raise HelpRequested(help_text)
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--"):
            raise ConfigurationError(f"{flag} is not an option; write options as --name value.")
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise ConfigurationError(f"unknown option {flag}; did you mean --{nearest}?")
        if not has_value and words and not words[0].startswith("--"):
            value = words.pop(0)
        if not value:
            kind = wanted.get(name, "a folder or name")
            raise ConfigurationError(f"{flag} has no value, but it must be {kind}.")
        given[name] = value
    for name in required:
        if name not in given:
            kind = wanted.get(name, "a folder")
            raise ConfigurationError(f"--{name} is not given, but it must be {kind}.")
    return given


def check_output(folder: Path) -> None:
    """Refuse an output folder that is a file, holds something or cannot be looked into.

    Raises:
        ConfigurationError: naming what is there.
    """
    seen, wanted = f"--output is {folder}, but", "it must be a new or empty folder"
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            which = "that" if existing == folder else str(existing)
            raise ConfigurationError(f"{seen} {which} is a file; {wanted}.")
        names = sorted(path.name for path in folder.iterdir()) if existing == folder else []
    except OSError as error:
        raise ConfigurationError(f"{seen} it cannot be read ({error.strerror}).") from error
    # What a killed run left does not count: the next one removes it.
    if names not in ([], [STAGING_FOLDER_NAME]):
        raise ConfigurationError(f"{seen} it holds {names[0]}; {wanted}.")


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Remove the folders that were made, if they are empty again after an error."""
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    is_done = False
    try:
        yield
        is_done = True
    finally:
        for path in () if is_done else made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def show_progress(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, and nothing elsewhere; yield what takes each amount written."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_interactive:
        yield lambda amount: None
        return
    columns = (
        TextColumn(label),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, refresh_per_second=2) as bar:
        task = bar.add_task("", total=total_bytes)
        yield lambda amount: bar.advance(task, amount)
