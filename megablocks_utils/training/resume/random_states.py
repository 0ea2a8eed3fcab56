"""Random states of this process, as JSON: what a resumed run needs to draw the same numbers."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megablocks_utils.checkpoint.json_file import parse_json
from megablocks_utils.errors import CheckpointError

__all__ = ["capture_random_states", "restore_random_states"]


def capture_random_states() -> bytes:
    """Return the states of Python's, numpy's and torch's generators."""
    generator = np.random.get_state(legacy=False)
    keys, position = generator["state"]["key"].tolist(), generator["state"]["pos"]
    gauss = [generator["has_gauss"], generator["gauss"]]
    states = {
        "python": random.getstate(),
        "numpy": [generator["bit_generator"], keys, position, *gauss],
        "torch": _to_text(torch.get_rng_state()),
        "cuda": _to_text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }
    return json.dumps(states).encode()


def restore_random_states(content: bytes, path: Path) -> None:
    """Continue with states that `capture_random_states` has returned.

    Those of the GPU are left as they are where either side has none.

    Args:
        content: the states.
        path: the file that holds them, for messages.

    Raises:
        CheckpointError: it holds no such states.
    """
    states = parse_json(content, path)
    try:
        _restore(states)
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} holds no random states: {reason}") from error


def _restore(states: Any) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_text(states["torch"]))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(states["cuda"]))


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
