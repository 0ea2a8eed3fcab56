"""What the commands beside training share: output folder, progress.

Torch-free, so that `--help` and bad options answer at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megablocks_utils.config.option import Option
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.files import STAGING_FOLDER_NAME

__all__ = ["OUTPUT_OPTION", "check_output", "removed_on_error", "show_progress"]

OUTPUT_OPTION = Option(
    "the folder to write; must not exist, or be empty; it is complete, or nothing is written",
    metavar="DIR",
    wanted="a folder",
)
"""The `--output` of commands that write a model or an adapter."""


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
