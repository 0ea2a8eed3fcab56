"""Errors of the disk, told with what of the run is kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megablocks_utils.checkpoint.snapshot import describe_kept, not_written
from megablocks_utils.errors import CheckpointError

__all__ = ["disk_errors_as_sentence"]


@contextmanager
def disk_errors_as_sentence(path: Path, output_dir: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that has vanished, into an error that a user can act on.

    Args:
        path: what is written.
        output_dir: of the run.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise not_written(path, error, output_dir) from error
    except CheckpointError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise CheckpointError(f"{error}; {describe_kept(output_dir)}") from error
