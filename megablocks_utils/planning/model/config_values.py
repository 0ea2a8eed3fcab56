"""Entries of a `config.json`, checked, with transformers' defaults where they are absent."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megablocks_utils.config.model_sizes import find_size_fault
from megablocks_utils.config.option import MAX_FLOAT32
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.families import READABLE_CONFIGS
from megablocks_utils.planning.model.config_defaults import read_defaults

__all__ = ["KNOWN_MODEL_TYPES", "ConfigValues"]

# transformers reads the number of experts under any of these names, whatever the family.
_ALIASES = MappingProxyType({"num_local_experts": ("num_experts", "n_routed_experts")})
KNOWN_MODEL_TYPES = tuple(READABLE_CONFIGS)


class ConfigValues:
    """Read a config's entries by name.

    Args:
        config: the entries of a `config.json`.

    Attributes:
        model_type: of the family.
        known: what the entries do not say of it.

    Raises:
        ConfigurationError: a `model_type` that is not known, or whose defaults cannot be read.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in READABLE_CONFIGS:
            known = ", ".join(READABLE_CONFIGS)
            raise ConfigurationError(
                f"model_type is {model_type!r} in the model's config.json, but plans are made for "
                f"{known} only."
            )
        self.model_type = model_type
        self._config = config
        self.known = READABLE_CONFIGS[model_type]
        self._defaults = read_defaults(model_type)

    def reads(self, name: str) -> bool:
        """Say whether the family has an entry of this name."""
        return name in self._defaults

    def size(self, name: str, *, at_least: int = 1) -> int:
        """Return a whole number.

        Raises:
            ConfigurationError: it is absent without a default, no whole number, or out of bounds.
        """
        value = self._get(name)
        wanted = find_size_fault(value, name, at_least=at_least)
        if wanted is not None:
            raise self.wrong(name, wanted)
        return int(value)

    def optional_size(self, name: str) -> int | None:
        """Return a whole number of at least 1; None where the entry is null or absent."""
        return None if self._get(name) is None else self.size(name)

    def flag(self, name: str) -> bool:
        """Return True or False; False where the entry is absent."""
        value = self._get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.wrong(name, "True or False")
        return value

    def numbers(self, name: str) -> list[int]:
        """Return a list of numbers; an empty one where the entry is null or absent."""
        value = self._get(name)
        if value is None:
            return []
        is_list = isinstance(value, list)
        if not is_list or any(find_size_fault(item, name, at_least=0) for item in value):
            raise self.wrong(name, "a list of layers")
        return value

    def fraction(self, name: str) -> float:
        """Return a number of at least 0."""
        value = self._get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Not `value < 0`, which NaN is not either.
        if not is_number or not 0 <= value <= MAX_FLOAT32:
            raise self.wrong(name, "a number of at least 0")
        return float(value)

    def wrong(self, name: str, wanted: str) -> ConfigurationError:
        """Say in a sentence what an entry is and what it must be."""
        return ConfigurationError(
            f"{name} is {repr(self._get(name))[:40]} in the {self.model_type} model's config.json, "
            f"but it must be {wanted}."
        )

    def _get(self, name: str) -> Any:
        names = (name, *_ALIASES.get(name, ()))
        for entries in (self._config, self._defaults):
            for alias in names:
                if alias in entries:
                    return entries[alias]
        return None
