"""Find the config.json of MODEL, on this machine only."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import MODEL_CONFIG_NAME

__all__ = ["find_config_file", "find_in_cache", "launch_name", "read_config_file"]


def find_config_file(model: str) -> Path:
    """Return the config.json of a folder, of a Hub model in the local cache, or the file itself.

    Raises:
        CheckpointError: it is not there; nothing is downloaded.
    """
    path = Path(os.path.expanduser(model))
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / MODEL_CONFIG_NAME).is_file():
            raise CheckpointError(f"MODEL is {model}, but that folder has no {MODEL_CONFIG_NAME}.")
        return path / MODEL_CONFIG_NAME
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.endswith(".json")
    if looks_local or model.count("/") > 1:
        raise CheckpointError(f"MODEL is {model}, but there is no such file or folder.")
    cached = find_in_cache(model, MODEL_CONFIG_NAME)
    if cached is None:
        raise CheckpointError(
            f"MODEL is {model}, but it is neither a folder or file here nor a model in the local "
            f"cache of the Hub; nothing is downloaded: run hf download {model} {MODEL_CONFIG_NAME},"
            f" or give a {MODEL_CONFIG_NAME}."
        )
    return cached


def read_config_file(path: Path) -> Mapping[str, Any]:
    """Read it.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not valid JSON"
        raise CheckpointError(f"MODEL is {path}, but it cannot be read: {reason}.") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"MODEL is {path}, but it holds no settings: no JSON object.")
    return settings


def launch_name(model: str) -> str:
    """Return what a run is given for MODEL: for a config.json the folder it is in."""
    path = Path(os.path.expanduser(model))
    if path.is_file() and path.name == MODEL_CONFIG_NAME:
        return str(path.parent)
    return model


def find_in_cache(name: str, file_name: str) -> Path | None:
    """Return a file of a Hub repository in the local cache; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file_name)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
