"""Keep tokens of a data set on disk, so that it is tokenized once and mapped from then on.

They live beside what `datasets` keeps, and may be deleted at any time. A folder of them appears
whole, by a rename; processes of other runs or hosts that make the same one at the same time do not
meet. Where that place cannot be written, they go to a temporary folder that the run removes.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.token_files import TokenWriter, is_intact

__all__ = ["PreparedTokens", "cache_folder", "prepare_tokens"]

WriteTokens = Callable[[TokenWriter], Mapping[str, Any]]
"""Writes all examples; returns facts to keep beside them."""


@dataclass(frozen=True)
class PreparedTokens:
    """Say where tokens are.

    Attributes:
        folder: of their files.
        is_temporary: whether nobody needs it once it is mapped.
        notes: what the user should know of the place, a sentence each.
    """

    folder: Path
    is_temporary: bool = False
    notes: tuple[str, ...] = ()

    def release(self) -> None:
        """Remove the folder if it is temporary; what is mapped of it stays readable."""
        if self.is_temporary:
            shutil.rmtree(self.folder, ignore_errors=True)


def cache_folder() -> Path:
    """Return where tokens are kept: the cache of `datasets`, as its environment variables say."""
    # Not `datasets.config`: it takes a second to import.
    cache_home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    hf_home = os.environ.get("HF_HOME", f"{cache_home}/huggingface")
    root = os.environ.get("HF_DATASETS_CACHE", f"{hf_home}/datasets")
    return Path(os.path.expanduser(root)) / "megablocks_utils"


def prepare_tokens(key: str | None, write: WriteTokens) -> PreparedTokens:
    """Return the folder of tokens; make it where it is not there, or damaged.

    Args:
        key: of the tokens; None: they cannot be found again, so a temporary folder will do.
        write: makes them.

    Raises:
        DataError: neither the cache nor a temporary folder can be written.
    """
    if key is None:
        return PreparedTokens(_write_temporary(write, ""), is_temporary=True)
    folder = cache_folder() / key
    try:
        if is_intact(folder):
            return PreparedTokens(folder)
        _publish(folder, write)
        return PreparedTokens(folder)
    except OSError as error:
        cause = f"{cache_folder()} cannot be written ({error.strerror or error})"
    note = f"{cause}: tokens are kept for this run only; HF_DATASETS_CACHE names another place"
    return PreparedTokens(_write_temporary(write, cause), is_temporary=True, notes=(note,))


def _publish(folder: Path, write: WriteTokens) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _written(write, folder.parent) as made:
        made.chmod(folder.parent.stat().st_mode)  # that of mkdtemp is for its owner alone
        if folder.exists() and not is_intact(folder):
            # Out of the way first: whoever has mapped it keeps its files.
            damaged = made.with_suffix(".damaged")
            folder.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            made.rename(folder)
        except OSError:
            if not is_intact(folder):  # else another process was faster
                raise


def _write_temporary(write: WriteTokens, cause: str) -> Path:
    try:
        with _written(write, None) as made:
            return made.rename(made.with_suffix(".tokens"))
    except OSError as error:
        reasons = f"{cause}, and " if cause else ""
        raise DataError(
            f"{reasons}the temporary folder cannot be written ({error.strerror or error}); "
            "the tokens of the data need room: HF_DATASETS_CACHE or TMPDIR name another place"
        ) from error


@contextmanager
def _written(write: WriteTokens, parent: Path | None) -> Iterator[Path]:
    """Make a folder of tokens with a name of its own; what the block leaves of it is removed."""
    made = Path(tempfile.mkdtemp(prefix=".tokens-", suffix=".tmp", dir=parent))
    try:
        writer = TokenWriter(made)
        writer.finish(write(writer))
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
