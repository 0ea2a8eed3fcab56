"""The manifest of a checkpoint: what it holds, and what every file must be to be that.

Written last, so that a folder without one is half-written. It carries the checksum of its own
content, so that an altered manifest is noticed like an altered file.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megablocks_utils.checkpoint.json_file import read_settings
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import sync_to_disk
from megablocks_utils.processes.output_folder import MANIFEST_NAME

__all__ = ["COMPATIBILITY_KEY", "adapters_of", "check_files", "describe_file"]
__all__ += ["read_manifest", "write_manifest"]

FORMAT_VERSION = 1
COMPATIBILITY_KEY = "continuity"
"""Of what a resumed run must share with the one that wrote the manifest, in format 1."""


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
        CheckpointError: there is none, it is truncated or altered, or a later version wrote it.
    """
    path = folder / MANIFEST_NAME
    manifest = read_settings(path, "checkpoint")
    checksum = manifest.get("sha256")
    if checksum != _own_checksum(manifest):
        raise CheckpointError(f"{path} was altered: its content does not have its checksum")
    if manifest["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {manifest['format']}, but this version reads {FORMAT_VERSION}"
        )
    return manifest


def adapters_of(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `LoraSettings` of the run that wrote a manifest; None where all was trained."""
    return manifest[COMPATIBILITY_KEY]["lora"]


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
        found_bytes = path.stat().st_size
        if found_bytes != wanted["bytes"]:
            kind = "truncated" if found_bytes < wanted["bytes"] else "altered"
            raise CheckpointError(
                f"{path} is {kind}: it has {found_bytes} bytes, the manifest says {wanted['bytes']}"
            )
    for name in names:
        found = describe_file(folder / name)["sha256"]
        if found != files[name]["sha256"]:
            raise CheckpointError(
                f"{folder / name} was altered: its checksum is {found[:12]}..., the manifest says "
                f"{files[name]['sha256'][:12]}..."
            )


def _own_checksum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
