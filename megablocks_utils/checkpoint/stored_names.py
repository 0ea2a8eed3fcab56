"""Which parameter or buffer each stored tensor belongs to, by transformers' mapping of names."""

import re
from collections.abc import Iterable, KeysView, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

__all__ = ["NameMapping", "StoredShapes", "StoredTensors", "Target", "last_number"]

_LAST_NUMBER = re.compile(r"^(.*\.)(\d+)(\..*)$")


class StoredTensors(Protocol):
    """Name stored tensors and their shapes; a `CheckpointIndex` does."""

    def keys(self) -> KeysView[str]:
        """Return every tensor's name."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of tensor `key`."""


class StoredShapes(dict[str, tuple[int, ...]]):
    """Hold shapes by name."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Return one of them."""
        return self[key]


class Target(NamedTuple):
    """Say where a stored tensor goes.

    Attributes:
        name: of the parameter or buffer; of a converter with several, the first one.
        pattern: what the converter calls this tensor; None where it is stored as in memory.
    """

    name: str
    pattern: str | None


class NameMapping:
    """Rename stored tensors as transformers does when it loads them into a model.

    Args:
        model: to be filled.
        state: what it holds, by name.
    """

    def __init__(self, model: PreTrainedModel, state: Mapping[str, Tensor]):
        self.transforms: list[WeightTransform] = get_model_conversion_mapping(model)
        self._state = dict(state)
        self._prefix = model.base_model_prefix
        self._renamings = [t for t in self.transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in self.transforms if isinstance(t, WeightConverter)]

    def converter(self, pattern: str) -> WeightConverter:
        """Return what converts the tensors that it calls `pattern`."""
        # The last one, as in transformers.
        return next(c for c in reversed(self._converters) if pattern in c.source_patterns)

    def targets(self, keys: Iterable[str]) -> dict[str, Target]:
        """Return where each stored tensor goes, in the order in which they are collected.

        Tensors whose names differ in the last number alone are renamed once, if the first and the
        last of them are renamed alike: those of the experts of a layer.
        """
        alike: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for key in keys:
            match = _LAST_NUMBER.match(key)
            form = (match[1], match[3]) if match else (key, "")
            alike.setdefault(form, []).append((int(match[2]) if match else 0, key))
        groups = [[key for _, key in sorted(group)] for group in alike.values()]
        found: dict[str, Target] = {}
        for group in sorted(groups, key=lambda group: dot_natural_key(group[0])):
            first, last = self._rename(group[0]), self._rename(group[-1])
            if first == last:
                found |= dict.fromkeys(group, first)
            else:
                found |= {key: self._rename(key) for key in group}
        return found

    def _rename(self, key: str) -> Target:
        renamed, pattern = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._state
        )
        if renamed not in self._state and key in self._state:
            renamed, pattern = rename_source_key(key, [], [], self._prefix, self._state)
        return Target(renamed, pattern)


def last_number(key: str) -> int:
    """Return the last number that is a part of a name; -1 where there is none."""
    match = _LAST_NUMBER.match(key)
    return int(match[2]) if match else -1
