"""A model's `config.json` and `generation_config.json`."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

from tests.fuzz.cases import Case, Expected, show
from tests.fuzz.mutate import (
    MISSING,
    ODD_VALUES,
    RAW_JSON,
    SPECIAL_FILES,
    edit_json,
    put_in_place,
    replace_file,
    set_value,
)

__all__ = ["CONFIG", "config_cases"]

NAME = "config.json"
CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "float32",
    "eos_token_id": 1,
    "head_dim": None,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.1,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "model_type": "mixtral",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": False,
    "pad_token_id": None,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "vocab_size": 400,
}
"""Fields of the tiny model's, and the type of each value."""
CHANGES: dict[str, tuple[dict[str, Any], Expected]] = {
    "tied, but with a head": ({"tie_word_embeddings": True}, "same"),
    "biases that are not there": ({"attention_bias": True}, "same"),
    "fewer layers": ({"num_hidden_layers": 1}, "refused"),
    "more layers": ({"num_hidden_layers": 3}, "refused"),
    "10^12 layers": ({"num_hidden_layers": 10**12}, "refused"),
    "fewer experts": ({"num_local_experts": 3}, "refused"),
    "more experts": ({"num_local_experts": 5}, "refused"),
    "three heads": ({"num_attention_heads": 3}, "refused"),
    "three key heads": ({"num_key_value_heads": 3}, "refused"),
    "top 9": ({"num_experts_per_tok": 9}, "refused"),
    "top 0": ({"num_experts_per_tok": 0}, "refused"),
    "another vocabulary": ({"vocab_size": 300}, "refused"),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "refused",
    ),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "refused"),
    "FP8": ({"quantization_config": {"quant_method": "fp8"}}, "any"),
    "FP8 of odd blocks": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
        "refused",
    ),
    "MXFP4": ({"quantization_config": {"quant_method": "mxfp4"}}, "any"),
    "no method": ({"quantization_config": {}}, "any"),
    "compressed": ({"compression_config": {"quant_method": "compressed-tensors"}}, "refused"),
    "foreign code": (
        {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}},
        "any",
    ),
    "another rotation": ({"rope_parameters": {"rope_type": "zzz"}}, "refused"),
    "attention by name": ({"_attn_implementation": "evil"}, "same"),
    "attention of the Hub": ({"_attn_implementation": "evil/kernel"}, "same"),
    "experts by name": ({"_experts_implementation": "zzz"}, "same"),
    "activation of code": ({"hidden_act": "__import__('os')"}, "refused"),
    "another family": ({"model_type": "qwen3_moe"}, "refused"),
    "no family": ({"model_type": "zzz"}, "refused"),
    "a list as family": ({"model_type": ["mixtral"]}, "refused"),
    "a dense family": ({"model_type": "mistral"}, "refused"),
    "another class": ({"architectures": ["LlamaForCausalLM"]}, "any"),
    "not finite": ({"rms_norm_eps": float("nan")}, "refused"),
    "unknown keys": ({"zzz": 1, "comment": "x"}, "same"),
}
GENERATION = {
    "empty": b"",
    "a list": b"[]",
    "wrong types": b'{"temperature": "x", "do_sample": 3}',
    "deep": b"[" * 100_000,
    "latin-1": b'{"a": "\xff"}',
    "null": b"null",
}


def config_cases(generator: Random) -> Iterator[Case]:
    """Yield every field with odd values, contradictions to the weights, and unreadable files."""

    def case(name: str, mutation: Any, expected: Expected = "same") -> Case:
        base = generator.choice(("train", "evaluate"))
        return Case("config", name, base, mutations={"model": mutation}, expected=expected)

    for field, stored in CONFIG.items():
        for odd in ODD_VALUES:
            if odd == stored and type(odd) is type(stored):
                continue
            shown = "missing" if odd is MISSING else show(odd)
            change = edit_json(set_value((field,), odd), NAME)
            if odd is MISSING and field in ("head_dim", "pad_token_id", "sliding_window"):
                continue
            yield case(f"{field}={shown}", change, _expected(stored, odd))
    for name, (changes, expected) in CHANGES.items():
        yield case(name, edit_json(lambda config, c=changes: config | c, NAME), expected)
    for name, content in RAW_JSON.items():
        yield case(f"raw: {name}", replace_file(NAME, content), "refused")
    twice = json.dumps(CONFIG)[:-1] + ',"hidden_size": 64}'
    yield case("raw: a key twice", replace_file(NAME, twice.encode()))
    yield case("raw: byte order mark", lambda folder: _add_mark(folder / NAME))
    yield case("raw: none", replace_file(NAME, None), "refused")
    for name, special in SPECIAL_FILES.items():
        yield case(f"raw: {name}", put_in_place(special, NAME), "refused")
    for name, content in GENERATION.items():
        yield case(f"generation: {name}", replace_file("generation_config.json", content))


def _expected(stored: Any, odd: Any) -> Expected:
    """A value of the field's own kind means something; no value means transformers' default."""
    if odd is None or odd is MISSING or stored is None:
        return "any"
    is_number = isinstance(odd, int | float) and not isinstance(odd, bool)
    if is_number and isinstance(stored, int | float) and not isinstance(stored, bool):
        return "any"
    return "any" if type(odd) is type(stored) else "same"


def _add_mark(path: Any) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
