"""Entries of a `config.json`, checked, with transformers' defaults where they are absent."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megablocks_utils.errors import ConfigurationError

__all__ = ["KNOWN_MODEL_TYPES", "ConfigValues"]

_COMMON = {"hidden_size": 2048, "num_experts_per_tok": 8, "tie_word_embeddings": False}
_DEFAULTS = MappingProxyType(
    {
        "mixtral": {
            **_COMMON,
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
        },
        "qwen3_moe": {
            **_COMMON,
            "vocab_size": 151936,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 768,
            "num_local_experts": 128,
        },
        "olmoe": {
            **_COMMON,
            "vocab_size": 50304,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_local_experts": 64,
        },
        "deepseek_v3": {
            **_COMMON,
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_shared_experts": 1,
            "num_local_experts": 256,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
        },
    }
)
# transformers reads the number of experts under any of these names, whatever the family.
_ALIASES = MappingProxyType({"num_local_experts": ("num_experts", "n_routed_experts")})
KNOWN_MODEL_TYPES = tuple(_DEFAULTS)
_WORDS = MappingProxyType({bool: "True or False", list: "a list of layers"})


class ConfigValues:
    """Read a config's entries by name.

    Args:
        config: the entries of a `config.json`.

    Raises:
        ConfigurationError: a `model_type` that is not known.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.model_type = config.get("model_type")
        if self.model_type not in _DEFAULTS:
            known = ", ".join(_DEFAULTS)
            raise ConfigurationError(
                f"model_type is {self.model_type!r} in the model's config.json, but plans are made "
                f"for {known}."
            )
        self._config = config
        self._defaults = _DEFAULTS[self.model_type]

    def size(self, name: str, *, at_least: int = 1) -> int:
        """Return a whole number.

        Raises:
            ConfigurationError: it is absent without a default, no whole number, or too small.
        """
        value = self._get(name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or value < at_least:
            raise self.wrong(name, f"a whole number of at least {at_least}")
        return value

    def size_or(self, name: str, otherwise: int | None, *, at_least: int = 1) -> int | None:
        """Return a whole number, or something else where the entry is null or absent."""
        return otherwise if self._get(name) is None else self.size(name, at_least=at_least)

    def flag(self, name: str) -> bool:
        """Return True or False; False where the entry is absent."""
        value = self._get(name)
        return bool(value) if value is None else self._typed(name, value, bool)

    def numbers(self, name: str) -> list:
        """Return a list; an empty one where the entry is null or absent."""
        value = self._get(name)
        return [] if value is None else self._typed(name, value, list)

    def fraction(self, name: str, default: float) -> float:
        """Return a number of at least 0."""
        value = self._config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise self.wrong(name, "a number of at least 0")
        return float(value)

    def wrong(self, name: str, wanted: str) -> ConfigurationError:
        """Say in a sentence what an entry is and what it must be."""
        return ConfigurationError(
            f"{name} is {self._get(name)!r} in the {self.model_type} model's config.json, but it "
            f"must be {wanted}."
        )

    def _get(self, name: str) -> Any:
        for alias in (name, *_ALIASES.get(name, ())):
            if alias in self._config:
                return self._config[alias]
        return self._defaults.get(name)

    def _typed(self, name: str, value: Any, kind: type) -> Any:
        if not isinstance(value, kind):
            raise self.wrong(name, _WORDS[kind])
        return value
