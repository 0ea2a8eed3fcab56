"""Every family that transformers brings is found, and is random wherever it has values."""

import torch

from tests.support.tiny_families import CAUSAL, COMPOSITE, build_tiny


def test_families_are_found_in_the_registry():
    assert len(CAUSAL) >= 58
    assert len(COMPOSITE) >= 22
    assert {"mixtral", "gpt_oss", "gemma4_text", "dbrx", "mistral4"} <= set(CAUSAL)
    assert {"gemma4", "kimi_k25", "qwen3_5_moe"} <= set(COMPOSITE)
    assert not {"llama", "switch_transformers"} & {*CAUSAL, *COMPOSITE}


def test_biases_and_stored_buffers_are_random_and_the_same_every_time():
    model, again = build_tiny("deepseek_v4"), build_tiny("deepseek_v4").state_dict()
    state = model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    biases = [v for name, v in state.items() if name.endswith(("bias", "tid2eid"))]
    assert biases
    assert all(value.unique().numel() > 1 for value in biases)
