"""Which parameter or buffer each stored tensor belongs to, by transformers' mapping of names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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

__all__ = ["NameMapping", "Target", "last_number"]

_LAST_NUMBER = re.compile(r"^(.*\.)(\d+)(\..*)$")


@dataclass(frozen=True)
class Target:
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

    def used(self) -> tuple[int, ...]:
        """Return which of the transforms have renamed or converted something, by number."""
        return tuple(n for n, transform in enumerate(self.transforms) if transform.was_used())

    def targets(self, keys: Iterable[str]) -> dict[str, Target]:
        """Return where each stored tensor goes, in the order in which they are collected.

        Tensors whose names differ in the last number alone are renamed once, if the first and the
        last of them are renamed alike: those of the experts of a layer.
        """
        ordered = sorted(keys, key=dot_natural_key)
        alike: dict[str, list[str]] = {}
        for key in ordered:
            alike.setdefault(_LAST_NUMBER.sub(r"\1*\3", key), []).append(key)
        found: dict[str, Target] = {}
        for key in ordered:
            if key in found:
                continue
            target = self._rename(key)
            found[key] = target
            group = alike[_LAST_NUMBER.sub(r"\1*\3", key)]
            if len(group) > 1 and key == group[0] and self._rename(group[-1]) == target:
                found |= dict.fromkeys(group, target)
        return {key: found[key] for key in ordered}

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
