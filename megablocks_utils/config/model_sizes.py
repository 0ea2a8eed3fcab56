"""How large the sizes in a model's `config.json` can sensibly be. Torch-free.

A model of 10^12 layers would be built until the memory is full, or planned until somebody stops it.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megablocks_utils.errors import CheckpointError

__all__ = ["check_model_sizes", "find_size_fault"]

_LIMITS = MappingProxyType(
    {
        "num_hidden_layers": 512,
        "hidden_size": 2**20,
        "vocab_size": 2**27,
        "intermediate_size": 2**24,
        "moe_intermediate_size": 2**24,
        "num_attention_heads": 2**16,
        "num_key_value_heads": 2**16,
        "head_dim": 2**16,
        "num_local_experts": 2**13,
        "num_experts": 2**13,
        "n_routed_experts": 2**13,
        "num_experts_per_tok": 2**13,
    }
)
_LARGEST = 2**30
_MAY_BE_NULL = ("num_key_value_heads", "head_dim")


def find_size_fault(value: object, name: str, *, at_least: int = 1) -> str | None:
    """Say what the value of an entry must be; None for one that can be used.

    Args:
        value: of any type.
        name: of the entry.
        at_least: the smallest size.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        return f"a whole number of at least {at_least}"
    largest = _LIMITS.get(name, _LARGEST)
    return f"at most {largest}" if value > largest else None


def check_model_sizes(settings: Mapping[str, Any], path: Path) -> None:
    """Refuse a size that no model has, before anything is built from it.

    Args:
        settings: the entries of a `config.json`; those that are absent have transformers' default.
        path: the file, for the message.

    Raises:
        CheckpointError: naming the entry, its value and what it must be.
    """
    for name in _LIMITS:
        if name not in settings or (settings[name] is None and name in _MAY_BE_NULL):
            continue
        wanted = find_size_fault(settings[name], name)
        if wanted is not None:
            raise CheckpointError(
                f"{name} is {repr(settings[name])[:40]} in {path}, but it must be {wanted}."
            )
