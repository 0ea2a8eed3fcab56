"""Weights in 4-bit codes that the kernels look up: to the bit what they make of the numbers.

Tiles have 16 rows, 32 columns and 16 steps of a sum; blocks of codes have 64 or 32 inputs. So a
tile has a part of a block, or some, and sizes of 72 and 100 cross tiles and end inside a block.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megablocks_utils.kernels.backends.backend_table import BACKENDS
from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.backends.packed import serve_format
from megablocks_utils.kernels.fused.fused_experts import run_experts_triton
from megablocks_utils.kernels.fused.matrices import CodedMatrix, build_matrix
from megablocks_utils.kernels.fused.tile import Tile
from megablocks_utils.kernels.gate import Activation, KnownActivation
from megablocks_utils.quantization.format_table import FORMATS
from megablocks_utils.quantization.packed_experts import PackedExperts
from megablocks_utils.quantization.packing import pack_all
from megablocks_utils.quantization.weight_format import CodedFormat, MatrixCut
from tests.support.layer_case import (
    PROJECTIONS,
    SMALL_TILES,
    LayerCase,
    pack_projections,
    prepare,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
FP32, BF16 = torch.float32, torch.bfloat16
SMALL = LayerCase(5, 72, 100, rank=4, frozen=PROJECTIONS)
# Tiles of two and of four blocks.
_BROAD = Tile(16, 128, 32, num_warps=4, num_stages=1)
BROAD_TILES = replace(SMALL_TILES, up=_BROAD, linear=_BROAD, act_backward=_BROAD)
CASES = {
    "nf4": (SMALL, FP32, SMALL_TILES),
    "nf4, as GPT-OSS": (
        replace(SMALL, has_bias=True, is_interleaved=True, is_transposed=True),
        BF16,
        BROAD_TILES,
    ),
    "mxfp4, no gate": (
        replace(SMALL, gate=KnownActivation(Activation.RELU_SQUARED)),
        FP32,
        BROAD_TILES,
    ),
    "mxfp4, received rows": (
        replace(SMALL, num_tokens=9, top_k=1, is_received=True),
        BF16,
        BROAD_TILES,
    ),
    "mxfp4, no token": (replace(SMALL, num_tokens=0), FP32, SMALL_TILES),
}


@pytest.mark.parametrize("name", CASES)
def test_codes_give_to_the_bit_what_their_numbers_give(name):
    case, dtype, tiles = CASES[name]
    run = prepare(case, dtype)
    packed, plain = pack_projections(run, name.split(",")[0])
    backend = partial(run_experts_triton, tiles=tiles)
    seen = replace(run, experts=packed).results(backend)
    # The same tiles, so that sums have the same order.
    same = partial(run_experts_triton, tiles=tiles.for_codes(dtype.itemsize))
    wanted = replace(run, experts=plain).results(same)
    for key, value in wanted.items():
        assert torch.equal(seen[key], value), key


@pytest.mark.parametrize("name", ["nf4", "mxfp4"])
def test_a_rank_with_some_columns_has_the_scales_of_these(name):
    """Their first is not the matrix's, and room for more experts than there are changes nothing."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 6, 320, generator=generator)
    whole = build_matrix(pack_all(name, weights, is_transposed=False), is_transposed=False)
    cut = MatrixCut([range(1, 2), range(4, 6)], range(128, 320), 6, 320)
    packed = PackedExperts.empty(
        name,
        torch.empty(2, 3, 192, device="meta"),
        device=torch.device("cpu"),
        is_transposed=False,
        cut=cut,
        num_allocated=3,
    )
    for number, matrix in enumerate(weights):
        packed.pack_expert(number, matrix)
    seen = build_matrix(packed, is_transposed=False)
    assert isinstance(seen, CodedMatrix) and isinstance(whole, CodedMatrix)
    rows, first = [1, 4, 5], 128 // seen.block
    assert torch.equal(seen.scales, whole.scales[:, rows, first:])
    assert torch.equal(seen.codes[:2], whole.codes[:, rows, 64:])
    assert (seen.num_rows, seen.num_cols) == (192, 3)


def test_autograd_saves_packed_weights_alone():
    """Neither the numbers nor their scales, which are made again."""
    run = prepare(replace(SMALL, rank=0), FP32)
    packed, _ = pack_projections(run, "nf4")
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        replace(run, experts=packed).forward(run_experts_triton)
    weights = [t for t in saved if t.dim() == 3]
    assert [type(tensor) for tensor in weights] == [PackedExperts] * 2
    rest = sum(tensor.nbytes for tensor in saved if tensor.dim() != 3)
    # Gate's inputs (rows, 2 * I), routing, and where experts end.
    assert rest <= 4 * 10 * 200 + 8 * 10 + 4 * 10 + 4 * 4


def test_other_formats_are_dequantized_for_it():
    triton = BACKENDS["triton"]
    coded = [name for name, kind in FORMATS.items() if isinstance(kind, CodedFormat)]
    assert set(triton.facts.unpacks) == set(coded) == {"nf4", "mxfp4"}
    assert serve_format(triton, run_experts_triton, "nf4") is run_experts_triton
    assert serve_format(triton, run_experts_triton, None) is run_experts_triton
    assert serve_format(triton, run_experts_triton, "int8") is not run_experts_triton
    assert serve_format(BACKENDS["eager"], run_experts_eager, "nf4") is not run_experts_eager
