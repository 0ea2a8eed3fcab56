"""A cheap identity of a model's weights: to tell two models of the same shape apart."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from megablocks_utils.checkpoint.index import CheckpointIndex, open_stored_checkpoint
from megablocks_utils.checkpoint.json_file import read_settings
from megablocks_utils.files import MODEL_CONFIG_NAME

__all__ = ["fingerprint_model_folder"]

# Settings that say nothing about the weights or what a model computes with them.
_WITHOUT_MEANING = ("_name_or_path", "architectures", "transformers_version", "use_cache")
_TENSORS_OF_A_KIND = 16
_SAMPLE_BYTES = 1024


def fingerprint_model_folder(folder: Path) -> str:
    """Return a SHA-256 of a model's configuration, tensor headers, and samples of its tensors.

    How the tensors are spread over files does not count. Of tensors whose names differ in numbers
    only (a projection in all layers and experts), 16 are sampled, at their start and middle: some
    hundred reads of 1 KiB for a model of any size. So a change of single values can be missed; a
    model that was trained differently is not.

    Raises:
        CheckpointError: the folder's configuration or weights cannot be read.
    """
    settings = read_settings(folder / MODEL_CONFIG_NAME, "model")
    meaning = {name: value for name, value in settings.items() if name not in _WITHOUT_MEANING}
    index = open_stored_checkpoint(folder)
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode())
    for key in sorted(index):
        digest.update(f"{key} {index.dtype(key)} {index.shape(key)}\n".encode())
    for key in _sampled_keys(index):
        digest.update(index.read_bytes(key, 0, _SAMPLE_BYTES))
        digest.update(index.read_bytes(key, index.num_bytes(key) // 2, _SAMPLE_BYTES))
    return digest.hexdigest()


def _sampled_keys(index: CheckpointIndex) -> Iterator[str]:
    """Yield the tensors to sample: of each kind the same number, spread over the model."""
    kinds = defaultdict(list)
    for key in index:
        numbers = tuple(int(number) for number in re.findall(r"\d+", key))
        kinds[re.sub(r"\d+", "#", key)].append((numbers, key))
    for _kind, keys in sorted(kinds.items()):
        keys.sort()
        num_sampled = min(_TENSORS_OF_A_KIND, len(keys))
        for place in range(num_sampled):
            yield keys[place * len(keys) // num_sampled][1]
