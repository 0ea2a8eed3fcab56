"""The fused kernels on a real GPU: every shipped tile, no host reads, results that repeat.

PYTHONPATH=. python -m pytest -q -rs tests/gpu
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from megablocks_utils.kernels.device import read_device_facts
from megablocks_utils.kernels.fused.fused_experts import run_experts_triton
from megablocks_utils.kernels.fused.tile import KINDS, TileTable
from megablocks_utils.kernels.fused.tiles import list_candidates, name_architecture
from megablocks_utils.kernels.gate import Activation, Clamp, KnownActivation, KnownGate
from tests.support.compare import relative_error
from tests.support.layer_case import (
    PROJECTIONS,
    LayerCase,
    assert_equals_obvious,
    pack_projections,
    prepare,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
BF16, FP32 = torch.bfloat16, torch.float32
GPT_OSS = KnownGate(clamp=Clamp.GPT_OSS, limit=0.7, alpha=1.702)
UNGATED = KnownActivation(Activation.RELU_SQUARED)
# Tiles are at most 128 x 256 x 64: 700 rows, 320 and 456 columns cross them and end inside one.
WIDE = LayerCase(400, 320, 456, num_experts=5)
LORA = replace(WIDE, rank=16, frozen=PROJECTIONS)
CASES = {
    "full": WIDE,
    "adapters": LORA,
    "adapters of rank 24": replace(LORA, rank=24),
    "all of it": replace(WIDE, rank=16),
    "whole boxes for descriptors": LayerCase(400, 256, 512, rank=16),
    "one token": replace(WIDE, num_tokens=1),
    "no token": replace(LORA, num_tokens=0),
    "one hot expert": replace(WIDE, top_k=1, routing="one expert", rank=8),
    "an expert twice in a token": replace(WIDE, routing="same twice"),
    "received rows": replace(LORA, top_k=1, is_received=True),
    "many small experts": LayerCase(300, 128, 96, num_experts=128, top_k=8, rank=16),
    "as GPT-OSS": replace(
        WIDE, has_bias=True, is_interleaved=True, is_transposed=True, gate=GPT_OSS, rank=8
    ),
    "gelu, clamped before": replace(LORA, gate=KnownGate(Activation.GELU_TANH, Clamp.BEFORE, 0.7)),
    "silu, clamped after": replace(WIDE, gate=KnownGate(clamp=Clamp.AFTER, limit=0.7)),
    "relu squared": replace(WIDE, gate=KnownGate(Activation.RELU_SQUARED)),
    "without a gate": replace(WIDE, rank=8, has_bias=True, gate=UNGATED),
    "without a gate, whole boxes": LayerCase(400, 256, 512, rank=16, gate=UNGATED),
}


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layer_equals_the_obvious_one(case, dtype):
    assert_equals_obvious(case, run_experts_triton, dtype, "cuda")


def _read_column(column: int, dtype: torch.dtype) -> TileTable:
    arch = name_architecture(read_device_facts("cuda").capability)
    candidates = {k: list_candidates(k, arch=arch, itemsize=dtype.itemsize) for k in KINDS}
    return TileTable(**{k: tiles[min(column, len(tiles) - 1)] for k, tiles in candidates.items()})


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("column", [0, 1, 2, 3])
def test_every_shipped_tile(column, dtype):
    run = partial(run_experts_triton, tiles=_read_column(column, dtype))
    assert_equals_obvious(LayerCase(700, 320, 512, rank=16), run, dtype, "cuda")


@pytest.mark.parametrize("column", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["nf4", "mxfp4"])
def test_codes_give_to_the_bit_what_their_numbers_give(name, column):
    """With the same tiles, so that sums have the same order; and nothing is read by the host."""
    case = replace(LayerCase(700, 320, 456, rank=16, frozen=PROJECTIONS), has_bias=True)
    if name == "mxfp4":
        case = replace(case, is_interleaved=True, is_transposed=True, gate=GPT_OSS)
    tiles = _read_column(column, BF16)
    run = prepare(case, BF16, "cuda")
    packed, plain = pack_projections(run, name)
    wanted = replace(run, experts=plain).results(
        partial(run_experts_triton, tiles=tiles.for_codes(BF16.itemsize))
    )
    packed_run = replace(run, experts=packed)
    packed_run.results(partial(run_experts_triton, tiles=tiles))  # compile first
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen = packed_run.results(partial(run_experts_triton, tiles=tiles))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(seen[key], value) for key, value in wanted.items())


def test_results_repeat_bit_for_bit():
    run = prepare(LORA, BF16, "cuda")
    first, second = (run.results(run_experts_triton) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_is_read_back_to_the_host():
    run = prepare(replace(WIDE, rank=16), BF16, "cuda")
    run.results(run_experts_triton)  # compile first
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.results(run_experts_triton)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_32_bits():
    """N * 2I is past 2**31 with 80 thousand rows of 2 x 14336: the last are as by themselves."""
    case = LayerCase(80_000, 64, 14336, num_experts=2, top_k=1, routing="one expert")
    run = prepare(case, BF16, "cuda")
    output = run.forward(run_experts_triton)
    tail = replace(case, num_tokens=64)
    leaves = {**run.leaves, "tokens": run.leaves["tokens"][-64:]}
    leaves["top_k_weights"] = run.leaves["top_k_weights"][-64:]
    wanted = run_experts_triton(
        leaves["tokens"],
        tail.build_order("cuda"),
        leaves["top_k_weights"],
        run.experts,
    )
    # Other tiles may round another way: a unit in the last place.
    assert relative_error(output[-64:], wanted) <= torch.finfo(BF16).eps


def test_a_layer_keeps_as_many_bytes_as_promised():
    """Of Qwen3-30B-A3B at 4096 tokens: T * H + 2 * N * I numbers, and the routing."""
    case = LayerCase(4096, 2048, 768, num_experts=16, top_k=8, rank=16, frozen=PROJECTIONS)
    run = prepare(case, BF16, "cuda")
    run.results(run_experts_triton)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = run.forward(run_experts_triton)
    kept = torch.cuda.memory_allocated() - before - output.numel() * output.element_size()
    num_rows = case.num_tokens * case.top_k
    hidden = 2 * num_rows * 2 * case.intermediate_size
    assert (
        hidden <= kept <= hidden + 4 * (case.num_experts + 1) + 8192
    )  # the tokens are the caller's
