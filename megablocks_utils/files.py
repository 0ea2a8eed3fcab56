"""Names of the files of models, adapters and runs; and files that are whole or not there at all.

Torch-free. Some mounts (FUSE, CIFS, object stores) have no links, sync no folders, or move nothing
onto what exists. There things are done another way, with one line that says so.
"""

import errno
import json
import math
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["ADAPTER_CONFIG_NAME", "ADAPTER_WEIGHTS_NAME", "DISK_FAULTS", "EXPERT_LOAD_NAME"]
__all__ += ["EXPERT_LOAD_PLOT_NAME", "GENERATION_CONFIG_NAME", "LOSS_PLOT_NAME", "METRICS_NAME"]
__all__ += ["MODEL_CONFIG_NAME", "MODEL_INDEX_NAME", "MODEL_WEIGHTS_NAME", "REPORT_NAME"]
__all__ += ["RUN_RECORD_NAME", "STAGING_FOLDER_NAME", "SAMPLES_NAME", "TRACKERS_FOLDER_NAME"]
__all__ += ["SAMPLES_PAGE_NAME", "TRACKER_RUNS_NAME"]
__all__ += ["finite_or_none", "publish_file", "remove_path", "replace_path", "sync_to_disk"]
__all__ += ["write_json_atomically", "write_pointer"]

# Of a model's folder and of a PEFT adapter's, as transformers and PEFT name them.
MODEL_CONFIG_NAME = "config.json"
MODEL_WEIGHTS_NAME = "model.safetensors"
MODEL_INDEX_NAME = "model.safetensors.index.json"
GENERATION_CONFIG_NAME = "generation_config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# Of a run's output folder.
METRICS_NAME = "metrics.jsonl"
RUN_RECORD_NAME = "run.json"
LOSS_PLOT_NAME = "loss.png"
EXPERT_LOAD_NAME = "expert_load.jsonl"
EXPERT_LOAD_PLOT_NAME = "expert_load.png"
REPORT_NAME = "report.html"
SAMPLES_NAME = "samples.jsonl"
SAMPLES_PAGE_NAME = "samples.md"
TRACKER_RUNS_NAME = "trackers.json"
TRACKERS_FOLDER_NAME = "runs"
"""Where trackers that write files do so: Trainer's own name for it."""

STAGING_FOLDER_NAME = ".model-being-written"
"""Where a model is written, inside its folder, until it is complete."""

DISK_FAULTS = frozenset(
    (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.ESTALE)
)
"""Errors that are the disk's: full, damaged, read-only or no longer there."""

_UNSUPPORTED = frozenset((errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS))
_UNSUPPORTED_OF_FOLDERS = _UNSUPPORTED | {errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}
_UNSUPPORTED_LINK = _UNSUPPORTED | {errno.EACCES, errno.EPERM}
_IN_THE_WAY = _UNSUPPORTED_LINK | {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}
_READER_S = 5.0  # how long a pipe waits for a reader


@contextmanager
def publish_file(path: str | Path) -> Iterator[Path]:
    """Hand out a temporary path beside `path` and move it there once the block ends well.

    The content reaches the disk before the name does. A block that raises leaves whatever `path`
    held before, and no temporary file. A link at `path` is replaced, its target left alone. What is
    no regular file (a device, a pipe, this process's own output) gets the content instead.

    Raises:
        OSError: The folder cannot be written.
    """
    path = Path(path)
    if _is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, path.name)
            with _open_stream(path) as stream, Path(folder, path.name).open("rb") as content:
                shutil.copyfileobj(content, stream)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        sync_to_disk(temporary)
        replace_path(temporary, path)
        sync_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomically(path: str | Path, payload: Any) -> None:
    """Write `payload` as indented JSON, with null where a number is not finite.

    Raises:
        OSError: The folder cannot be written.
        TypeError: The payload holds something JSON has no form for.
    """
    text = json.dumps(finite_or_none(payload), indent=2, allow_nan=False) + "\n"
    with publish_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_pointer(path: Path, name: str) -> None:
    """Have `path` point to its neighbour `name`: a link, or a small file where there are no links.

    Raises:
        OSError: The folder cannot be written, or `path` is a folder.
    """
    temporary = path.with_name(f".{path.name}")
    remove_path(temporary)
    try:
        temporary.symlink_to(name)
    except OSError as error:
        if error.errno not in _UNSUPPORTED_LINK:
            raise
        temporary.write_text(f"{name}\n", encoding="utf-8")
        sync_to_disk(temporary)
        _tell_limits(path.parent)
    replace_path(temporary, path)
    sync_to_disk(path.parent)


def replace_path(source: Path, target: Path) -> None:
    """Move a file or folder to a name that may be taken; a link there is replaced, not followed.

    Where nothing can be moved onto what exists, the old one is kept as `.NAME.old` until the new
    one has its name.

    Raises:
        OSError: It cannot be moved, or would take the place of a folder without being one.
    """
    try:
        source.replace(target)
        return
    except OSError as error:
        is_folder = target.is_dir() and not target.is_symlink()
        is_lost = is_folder and not source.is_dir()
        if error.errno not in _IN_THE_WAY or is_lost or not os.path.lexists(target):
            raise
    old = target.with_name(f".{target.name}.old")
    remove_path(old)
    target.rename(old)
    try:
        source.rename(target)
    except OSError:
        old.rename(target)
        raise
    remove_path(old)
    if not is_folder:
        _tell_limits(target.parent)


def remove_path(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, but never what a link leads to."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path)
    except OSError as error:
        if error.errno not in _UNSUPPORTED_OF_FOLDERS:
            raise
        # It opens folders, as for a sync, which not every mount allows; listing them suffices.
        for child in path.iterdir():
            remove_path(child)
        path.rmdir()


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on disk, where the file system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        is_folder = path.is_dir()
        if error.errno not in (_UNSUPPORTED_OF_FOLDERS if is_folder else _UNSUPPORTED):
            raise
        _tell_limits(path if is_folder else path.parent)


def finite_or_none(payload: Any) -> Any:
    """Return `payload` with None for every NaN and infinity, which strict JSON cannot express."""
    if isinstance(payload, dict):
        return {key: finite_or_none(value) for key, value in payload.items()}
    if isinstance(payload, (list, tuple)):
        return [finite_or_none(value) for value in payload]
    if isinstance(payload, float) and not math.isfinite(payload):
        return None
    return payload


def _is_stream(path: Path) -> bool:
    """Return whether content can only be sent to `path`: no file that another could replace."""
    try:
        found = path.stat()
    except OSError:
        return False
    if stat.S_ISDIR(found.st_mode):
        return False
    return not stat.S_ISREG(found.st_mode) or _own_output(found) is not None


def _own_output(found: os.stat_result) -> int | None:
    """Return the descriptor of this process that is the file, or None: /dev/stdout may be one."""
    for descriptor in (1, 2):
        with suppress(OSError):  # a closed one
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
    return None


def _open_stream(path: Path) -> BinaryIO:
    own = _own_output(path.stat())
    if own is not None:
        sys.stdout.flush()
        return os.fdopen(os.dup(own), "wb")
    last_s = time.monotonic() + _READER_S
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            break
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > last_s:
                raise
            time.sleep(0.05)
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "wb")


_told: set[int] = set()
"""Devices whose limits were told."""


def _tell_limits(folder: Path) -> None:
    """Say in one line, once, what the file system of a folder cannot do."""
    device = folder.stat().st_dev
    if device in _told:
        return
    _told.add(device)
    trials = {
        "has no links": _try_link,
        "does not sync folders": _try_sync,
        "moves nothing onto what exists": _try_replace,
    }
    lacks = [what for what, attempt in trials.items() if not _succeeds(attempt, folder)]
    if lacks:
        sys.stderr.write(
            f"{folder}: this file system {' and '.join(lacks)}; files are written in another way "
            "there, and nothing is lost.\n"
        )


def _succeeds(attempt: Callable[[Path, Path], None], folder: Path) -> bool:
    paths = [folder / f".trial-{os.getpid()}-{number}" for number in range(2)]
    try:
        attempt(*paths)
    except OSError as error:
        return error.errno not in _IN_THE_WAY | _UNSUPPORTED_OF_FOLDERS
    finally:
        for path in paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)
    return True


def _try_link(first: Path, second: Path) -> None:
    first.symlink_to(second.name)


def _try_sync(first: Path, _second: Path) -> None:
    descriptor = os.open(first.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_replace(first: Path, second: Path) -> None:
    first.touch()
    second.touch()
    first.replace(second)
