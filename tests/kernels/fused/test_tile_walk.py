"""The persistent walk: each tile once, and what one program a tile computes, bit by bit."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import interpreter_builder

from megablocks_utils.kernels.fused import kernel_launch
from megablocks_utils.kernels.fused.gate_up import gate_up
from megablocks_utils.kernels.fused.kernel_launch import (
    GateLayout,
    KernelLaunch,
    LoraRows,
    Routing,
)
from megablocks_utils.kernels.fused.matrices import Matrix
from megablocks_utils.kernels.fused.row_gemm import row_gemm
from megablocks_utils.kernels.fused.tile import Tile
from megablocks_utils.kernels.fused.tile_walk import find_tile, list_experts
from megablocks_utils.kernels.gate import SWIGLU, Activation, Clamp, KnownActivation, KnownGate
from tests.kernels.fused.test_kernels import TOP_K, build_routing, draw

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
TILE = Tile(16, 32, 16, num_warps=4, num_stages=1)
GPT_OSS = KnownGate(clamp=Clamp.GPT_OSS, limit=0.7, alpha=1.702)
COUNTS = {
    "an expert without rows": ([18, 0, 3], 1),
    "one expert with all rows": ([0, 21, 0], 64),
    "more row tiles than a group": ([2, 37, 0], 3),
}
GATES = (
    KnownGate(),
    KnownGate(Activation.GELU_TANH, Clamp.BEFORE, 0.7),
    KnownGate(Activation.RELU_SQUARED, Clamp.AFTER, 0.7),
    GPT_OSS,
)


@triton.jit
def _list_walk(
    out_ptr, offsets_ptr, num_experts, num_tiles_n, num_tiles, BLOCK_M: tl.constexpr
):  # fmt: skip
    listed = list_experts(offsets_ptr, num_experts, num_tiles_n, 4, BLOCK_M)
    for tile in range(num_tiles):
        expert, rows, exists, tile_n = find_tile(listed, tile, num_tiles_n, 4, BLOCK_M, 2)
        tl.store(out_ptr + 4 * tile, expert)
        tl.store(out_ptr + 4 * tile + 1, tl.min(rows, 0))
        tl.store(out_ptr + 4 * tile + 2, tl.sum(exists.to(tl.int32), 0))
        tl.store(out_ptr + 4 * tile + 3, tile_n)


def test_groups_of_row_tiles_share_a_column_tile_and_end_with_their_expert():
    """The drawing in `tile_walk`: experts of 3, 0 and 1 row tiles, two of them to a group."""
    offsets = torch.tensor([0, 10, 10, 13]).int()
    seen = torch.full((8, 4), -1, dtype=torch.int32)
    _list_walk[(1,)](seen, offsets, 3, 2, 8, BLOCK_M=4)
    assert [tuple(tile) for tile in seen.tolist()] == [
        *((0, 0, 4, 0), (0, 4, 4, 0), (0, 0, 4, 1), (0, 4, 4, 1)),
        *((0, 8, 2, 0), (0, 8, 2, 1), (2, 10, 3, 0), (2, 10, 3, 1)),
    ]


def _lora(routing: Routing, num_cols: int, dtype: torch.dtype) -> LoraRows:
    rows, factor = draw(routing.num_rows, 5, seed=2), draw(3, 5, num_cols, seed=3)
    return LoraRows(rows.to(dtype), Matrix(factor.to(dtype), rows_are_last=False))


def _run_gate_up(tile, routing, gate=SWIGLU, *, has_more=False):
    num_tokens, intermediate_size = routing.num_rows // TOP_K, 40
    tokens, weights = draw(num_tokens, 32), draw(3, 2 * intermediate_size, 32, seed=1) / 4
    return gate_up(
        tokens,
        Matrix(weights, rows_are_last=True),
        routing,
        tile,
        GateLayout(gate, is_interleaved=False),
        keeps_gate_up_out=True,
        lora=_lora(routing, 2 * intermediate_size, tokens.dtype) if has_more else None,
        bias=draw(3, 2 * intermediate_size, seed=4) if has_more else None,
    )


def _run_row_gemm(tile, routing, gate, *, dtype=torch.float32, scatter=False, num_cols=40):
    x, weights = draw(routing.num_rows // TOP_K, 32).to(dtype), draw(3, 32, num_cols, seed=1) / 4
    kept = None if gate is None else x.new_empty(routing.num_rows, num_cols)
    result = row_gemm(
        x,
        Matrix(weights.to(dtype), rows_are_last=False),
        routing,
        tile,
        gather=True,
        scatter=scatter,
        scale=0.5,
        lora=_lora(routing, num_cols, dtype),
        bias=draw(3, num_cols, seed=4).to(dtype),
        layout=None if gate is None else GateLayout(gate, isinstance(gate, KnownGate)),
        gate_up_out=kept,
    )
    return result, kept


@pytest.fixture
def count_written(monkeypatch):
    """Run something and return what it returns, and how many elements its kernels stored."""
    store, written = interpreter_builder.create_masked_store, []

    def record(ptrs, value, mask, *options):
        written.append(int(mask.data.sum()))
        return store(ptrs, value, mask, *options)

    def run(function, *args, **kwargs):
        written.clear()
        return function(*args, **kwargs), sum(written)

    monkeypatch.setattr(interpreter_builder, "create_masked_store", record)
    return run


def assert_walks_alike(count_written, function, tile, routing, *args, programs=2, **kwargs):
    """Walk with so many programs: each result is stored once, and is that of a program a tile."""
    wanted = [tensor for tensor in function(tile, routing, *args, **kwargs) if tensor is not None]
    assert all(tensor.isfinite().all() for tensor in wanted)
    walk = replace(tile, programs_per_processor=programs)
    results, written = count_written(function, walk, routing, *args, **kwargs)
    seen = [tensor for tensor in results if tensor is not None]
    assert all(map(torch.equal, seen, wanted))
    assert written == sum(tensor.numel() for tensor in wanted)


@pytest.mark.parametrize(("counts", "programs"), COUNTS.values(), ids=COUNTS)
def test_every_tile_is_stored_once_and_as_by_a_program_of_its_own(
    counts, programs, count_written, monkeypatch
):
    """Also by 64 programs, of which most have no tile."""
    monkeypatch.setattr(kernel_launch, "GROUP_M", 2)
    routing = build_routing(counts)
    assert_walks_alike(count_written, _run_row_gemm, TILE, routing, None, programs=programs)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: f"{gate.activation}, clamp {gate.clamp}")
def test_gates_of_gate_up(gate, count_written):
    has_more = gate == SWIGLU
    tile = replace(TILE, uses_tma=gate.clamp is Clamp.BEFORE)
    routing = build_routing([0, 17, 1] if has_more else [1, 0, 2])
    assert_walks_alike(count_written, _run_gate_up, tile, routing, gate, has_more=has_more)


@pytest.mark.parametrize(
    ("gate", "dtype", "num_cols"),
    [
        (GPT_OSS, torch.bfloat16, 40),
        (KnownActivation(Activation.RELU_SQUARED), torch.float32, 40),
        (SWIGLU, torch.float32, 300),
    ],
    ids=["interleaved", "no gate", "wide, in parts"],
)
def test_gates_of_row_gemm(gate, dtype, num_cols, count_written):
    tile = TILE if num_cols < 256 else replace(TILE, block_n=256)
    kind = {"dtype": dtype, "num_cols": num_cols, "scatter": num_cols > 256}
    assert_walks_alike(count_written, _run_row_gemm, tile, build_routing([1, 0, 20]), gate, **kind)


def test_an_adapter_of_more_than_one_step_has_a_program_a_tile():
    routing, walk = build_routing(), replace(TILE, programs_per_processor=2)
    matrix = Matrix(draw(3, 32, 40), rows_are_last=False)
    for rank, programs in ((64, 2), (65, 4 * 2)):
        factor = Matrix(draw(3, rank, 40), rows_are_last=False)
        launch = KernelLaunch(matrix, routing, walk, LoraRows(draw(21, rank), factor))
        assert launch.count_programs(40) == programs
    assert (
        KernelLaunch(matrix, routing, replace(walk, programs_per_processor=64)).count_programs(40)
        == 8
    )
