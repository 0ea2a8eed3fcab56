"""Read a JSON file of settings: `config.json` of a model, `adapter_config.json` of an adapter."""

import json
from pathlib import Path
from typing import Any

from megablocks_utils.errors import CheckpointError

__all__ = ["read_settings"]


def read_settings(path: Path, kind: str) -> dict[str, Any]:
    """Return the settings in a file.

    Args:
        path: the file.
        kind: what messages call its folder, "model" or "adapter".

    Raises:
        CheckpointError: there is no such file, or it is not a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"the {kind} folder {path.parent} has no {path.name}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds no settings: its JSON is not an object")
    return settings
