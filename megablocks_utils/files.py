"""Names of the files of models, adapters and runs; and files that are whole or not there at all.

Torch-free.
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "ADAPTER_CONFIG_NAME",
    "ADAPTER_WEIGHTS_NAME",
    "GENERATION_CONFIG_NAME",
    "LOSS_PLOT_NAME",
    "METRICS_NAME",
    "MODEL_CONFIG_NAME",
    "MODEL_INDEX_NAME",
    "MODEL_WEIGHTS_NAME",
    "RUN_RECORD_NAME",
    "STAGING_FOLDER_NAME",
    "TRACKERS_FOLDER_NAME",
    "finite_or_none",
    "publish_file",
    "sync_to_disk",
    "write_json_atomically",
]

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
TRACKERS_FOLDER_NAME = "runs"
"""Where trackers that write files do so: Trainer's own name for it."""

STAGING_FOLDER_NAME = ".model-being-written"
"""Where a model is written, inside its folder, until it is complete."""


@contextmanager
def publish_file(path: str | Path) -> Iterator[Path]:
    """Hand out a temporary path beside `path` and move it there once the block ends well.

    The content reaches the disk before the name does. A block that raises leaves whatever `path`
    held before, and no temporary file.

    Raises:
        OSError: The folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync_to_disk(temporary)
        os.replace(temporary, path)
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


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite_or_none(payload: Any) -> Any:
    """Return `payload` with None for every NaN and infinity, which strict JSON cannot express."""
    if isinstance(payload, dict):
        return {key: finite_or_none(value) for key, value in payload.items()}
    if isinstance(payload, (list, tuple)):
        return [finite_or_none(value) for value in payload]
    if isinstance(payload, float) and not math.isfinite(payload):
        return None
    return payload
