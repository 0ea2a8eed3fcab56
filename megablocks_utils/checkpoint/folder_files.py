"""Names of files that a folder gives for its own: they never lead outside it.

An index or a manifest that somebody wrote can name `../secret`, and a file in a folder can be a
link to anywhere. A folder in the Hub's cache is made of links into the `blobs` beside it; those
are its own files. The folder itself may be a link: who names it means what it leads to.
"""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from megablocks_utils.checkpoint.json_file import refuse_lfs_pointer, show_value
from megablocks_utils.errors import CheckpointError

__all__ = ["check_files_of_folder", "find_file", "is_plain_name", "refuse_link_out"]

_MAX_NAME_BYTES = 255
_HUB_SNAPSHOTS, _HUB_BLOBS = "snapshots", "blobs"
# A pointer of Git LFS has about 130 bytes.
_LARGEST_POINTER_BYTES = 1024


def find_file(folder: Path, name: object, source: Path) -> Path:
    """Return the path of a file of a folder that another file of it names.

    Args:
        folder: the folder.
        name: as it is named there, with forward slashes.
        source: the file that names it, for messages.

    Raises:
        CheckpointError: the name is no relative path within the folder, there is no such file, or
            it is a link that leads out of the folder.
    """
    if not isinstance(name, str) or not is_plain_name(name):
        raise CheckpointError(
            f"{source} names the file {show_value(name)}, wanted is a name within its folder"
        )
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{source} names {name}, which is not in the folder")
    refuse_link_out(folder, path)
    return path


def is_plain_name(name: str) -> bool:
    """Return whether a name is a relative path that stays within its folder."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and name.isprintable()
        and not name.startswith("/")
        and not name.endswith("/")
        and ".." not in parts
        and all(len(part.encode()) <= _MAX_NAME_BYTES for part in parts)
    )


def refuse_link_out(folder: Path, path: Path) -> None:
    """Refuse a file of a folder whose real place is outside it.

    Raises:
        CheckpointError: it is, or it leads in a circle.
    """
    try:
        own, real = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # of a circle of links
        raise CheckpointError(f"{path} is a link that leads nowhere") from error
    if not any(real.is_relative_to(place) for place in _own_places(own)):
        raise CheckpointError(
            f"{path} leads out of its folder, to {real}: put the file itself there (a copy or a"
            " hard link), or give the folder that holds it"
        )


def check_files_of_folder(folder: Path, patterns: Iterable[str]) -> None:
    """Refuse files that lead out of a folder, and pointers of Git LFS in their place.

    Args:
        folder: of a model or an adapter.
        patterns: the files that are read.

    Raises:
        CheckpointError: naming the first such file.
    """
    try:
        paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        for path in paths:
            if path.is_symlink():
                refuse_link_out(folder, path)
            if path.is_file() and path.stat().st_size <= _LARGEST_POINTER_BYTES:
                refuse_lfs_pointer(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error


def _own_places(folder: Path) -> list[Path]:
    """Return where the files of a folder may really be: in it, or in the blobs of its repository.

    A folder of the Hub's cache is `models--owner--name/snapshots/<commit>`.
    """
    parents = folder.parents
    if len(parents) > 1 and parents[0].name == _HUB_SNAPSHOTS:
        return [folder, parents[1] / _HUB_BLOBS]
    return [folder]
