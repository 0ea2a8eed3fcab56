"""What PEFT and transformers make of a base and an adapter, and whether two folders are equal."""

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from megablocks_utils.checkpoint.index import open_checkpoint
from tests.support.tiny_models import build_tiny_model


def save_base(family, folder, dtype=torch.float32, *, sharded=True, fused=False, **overrides):
    """Write a tiny model in a dtype, in the family's Hub layout or with fused experts."""
    model = build_tiny_model(family, **overrides).to(dtype)
    model.save_pretrained(
        folder, max_shard_size="100KB" if sharded else "5GB", save_original_format=not fused
    )


def merge_with_peft(base, adapter, output, *, fused=False):
    """Write what PEFT merges, with transformers' own `save_pretrained`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(output, save_original_format=not fused)


def assert_same_model(seen, wanted):
    """All names, dtypes and bits are equal."""
    seen, wanted = open_checkpoint(seen), open_checkpoint(wanted)
    assert set(seen) == set(wanted)
    for key in wanted:
        assert seen.dtype(key) == wanted.dtype(key)
        assert torch.equal(seen.read(key), wanted.read(key)), key
