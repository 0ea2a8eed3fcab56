"""Read the rank of the adapter that a planned run resumes, on this machine only."""

import json
import os
from pathlib import Path

from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import ADAPTER_CONFIG_NAME
from megablocks_utils.planning.model.config_file import find_in_cache

__all__ = ["read_adapter_rank"]


def read_adapter_rank(adapter: str) -> int | None:
    """Return the rank that a PEFT adapter, a folder or Hub name, has where no pattern says another.

    Returns:
        None where it is not on this machine; nothing is downloaded.

    Raises:
        CheckpointError: its settings cannot be read, or have no rank.
    """
    folder = Path(os.path.expanduser(adapter))
    path = folder / ADAPTER_CONFIG_NAME
    if not path.is_file():
        cached = None if folder.exists() else find_in_cache(adapter, ADAPTER_CONFIG_NAME)
        if cached is None:
            return None
        path = cached
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not valid JSON"
        raise CheckpointError(f"{path} cannot be read: {reason}.") from error
    rank = settings.get("r") if isinstance(settings, dict) else None
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path} has r {rank!r:.40}, wanted is a whole number of at least 1.")
    return rank
