"""The manifest of a checkpoint: what it holds, and what every file must be to be that.

Written last, so that a folder without one is half-written. It carries the checksum of its own
content, so that an altered manifest is noticed like an altered file.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megablocks_utils.checkpoint.dcp_index import DCP_INDEX_NAME
from megablocks_utils.checkpoint.folder_files import is_plain_name, refuse_link_out
from megablocks_utils.checkpoint.index import HUB_FILE_PATTERNS
from megablocks_utils.checkpoint.json_file import JsonObject, read_settings, show_value
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import EXPERT_LOAD_NAME, METRICS_NAME, SAMPLES_NAME, sync_to_disk
from megablocks_utils.processes.output_folder import MANIFEST_NAME

__all__ = ["check_files", "describe_file", "read_manifest", "write_manifest"]

FORMAT_VERSION = 1
_LOGS = (METRICS_NAME, EXPERT_LOAD_NAME, SAMPLES_NAME)
_FILES_THAT_ARE_READ = (DCP_INDEX_NAME, "*.distcp", *_LOGS, *HUB_FILE_PATTERNS)


def describe_file(path: Path) -> dict[str, Any]:
    """Return size and checksum of a file, as the manifest lists them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def write_manifest(
    folder: Path, contents: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the manifest of a complete folder, and wait until it is on disk.

    Args:
        folder: of the checkpoint.
        contents: what it says besides its files; JSON values only, with a `step`.
        files: name -> `describe_file` of every other file in the folder.
    """
    manifest = {"format": FORMAT_VERSION, **contents, "files": dict(sorted(files.items()))}
    manifest["sha256"] = _own_checksum(manifest)
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync_to_disk(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it is truncated or altered, a later version wrote it, it
            does not list every file that is read, or it lists one outside the folder.
    """
    path = folder / MANIFEST_NAME
    manifest = read_settings(path, "checkpoint")
    refuse_link_out(folder, path)
    if manifest.get("sha256") != _own_checksum(manifest):
        raise CheckpointError(f"{path} was altered: its content does not have its checksum")
    contents = JsonObject(path, manifest)
    version = contents.whole_number("format")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, but this version reads {FORMAT_VERSION}"
        )
    _check_listing(folder, contents)
    return manifest


def _check_listing(folder: Path, manifest: JsonObject) -> None:
    """Refuse a manifest that does not list, as it should, every file that is read of its folder."""
    manifest.whole_number("step")
    path, files = manifest.path, manifest.section("files")
    for name, file in files.sections():
        file.whole_number("bytes")
        file.text("sha256")
        if not is_plain_name(name):
            raise CheckpointError(
                f"{path} names the file {show_value(name)}, wanted is a name within its folder"
            )
    found = {file.name for pattern in _FILES_THAT_ARE_READ for file in folder.glob(pattern)}
    unlisted = sorted(found - {MANIFEST_NAME} - set(files.values))
    if unlisted or not files.values:
        raise CheckpointError(f"{path} does not list {', '.join(unlisted[:1]) or 'any file'}")


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> None:
    """Compare files with what the manifest says of them.

    Args:
        folder: of the checkpoint.
        files: the manifest's `files`.
        names: those to read; the others are only looked for, and measured.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or altered.
    """
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"the checkpoint {folder} lacks its file {name}")
        refuse_link_out(folder, path)
        found_bytes = path.stat().st_size
        if found_bytes != wanted["bytes"]:
            kind = "truncated" if found_bytes < wanted["bytes"] else "altered"
            raise CheckpointError(
                f"{path} is {kind}: it has {found_bytes} bytes, the manifest says {wanted['bytes']}"
            )
    for name in names:
        try:
            found = describe_file(folder / name)["sha256"]
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}") from error
        if found != files[name]["sha256"]:
            raise CheckpointError(
                f"{folder / name} was altered: its checksum is {found[:12]}..., the manifest says "
                f"{files[name]['sha256'][:12]}..."
            )


def _own_checksum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
