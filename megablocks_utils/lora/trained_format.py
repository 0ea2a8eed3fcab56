"""The format that the experts under an adapter were packed in, kept in its file.

Readers of safetensors pass over metadata that they do not know; PEFT refuses such settings.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from megablocks_utils.config.quantization import NO_QUANTIZATION, QUANTIZATIONS
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import ADAPTER_WEIGHTS_NAME

__all__ = ["build_metadata", "read_trained_format"]

_KEY = "expert_quantization"


def build_metadata(weight_format: str | None) -> dict[str, str]:
    """Return the metadata of the weights of an adapter that was trained over experts so packed."""
    return {"format": "pt"} | ({} if weight_format is None else {_KEY: weight_format})


def read_trained_format(folder: Path) -> str:
    """Return the format that an adapter was trained over; `none` where its file does not say.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / ADAPTER_WEIGHTS_NAME
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get(_KEY, NO_QUANTIZATION)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return found if found in QUANTIZATIONS else NO_QUANTIZATION
