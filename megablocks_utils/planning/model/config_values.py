"""Entries of a `config.json`, checked, with transformers' defaults where they are absent."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megablocks_utils.config.model_sizes import find_size_fault
from megablocks_utils.config.option import MAX_FLOAT32
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


class ConfigValues:
    """Read a config's entries by name.

    Args:
        config: the entries of a `config.json`.

    Raises:
        ConfigurationError: a `model_type` that is not known.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in _DEFAULTS:
            known = ", ".join(_DEFAULTS)
            raise ConfigurationError(
                f"model_type is {model_type!r} in the model's config.json, but plans are made for "
                f"{known} only."
            )
        self.model_type = model_type
        self._config = config
        self._defaults = _DEFAULTS[model_type]

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

    def fraction(self, name: str, default: float) -> float:
        """Return a number of at least 0."""
        value = self._config.get(name, default)
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
        for alias in (name, *_ALIASES.get(name, ())):
            if alias in self._config:
                return self._config[alias]
        return self._defaults.get(name)
