"""Each kernel by itself against its formula in fp64: the paths that a whole layer rarely takes."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu
from triton.runtime.interpreter import GridExecutor

from megablocks_utils.kernels.fused.combine import combine
from megablocks_utils.kernels.fused.fused_experts import run_experts_triton
from megablocks_utils.kernels.fused.gate_backward import Wanted, gate_backward
from megablocks_utils.kernels.fused.gate_up import gate_up
from megablocks_utils.kernels.fused.kernel_launch import (
    GateLayout,
    LoraRows,
    Routing,
    compile_options,
)
from megablocks_utils.kernels.fused.matrices import Matrix
from megablocks_utils.kernels.fused.row_gemm import row_gemm
from megablocks_utils.kernels.fused.tile import Tile, TileTable
from megablocks_utils.kernels.fused.weight_grad import Operand, weight_grad
from megablocks_utils.kernels.gate import SWIGLU
from tests.support.compare import relative_error
from tests.support.layer_case import LayerCase, assert_equals_obvious

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
TILE = Tile(16, 32, 16, num_warps=4, num_stages=1)
TMA = replace(TILE, uses_tma=True)
# fp32 sums of at most 48 products, in another order: 48 times half a unit at the very worst.
BOUND = 48 * torch.finfo(torch.float32).eps / 2
COUNTS = [18, 0, 3]
NUM_TOKENS, TOP_K = 7, 3


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build_routing(counts: list[int] = COUNTS, top_k: int = TOP_K) -> Routing:
    """Return a routing that is no sorting of anything: any permutation of the rows."""
    num_rows = sum(counts)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(3))
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    return Routing(order, offsets, num_rows, top_k)


def expert_of_row(counts: list[int] = COUNTS) -> torch.Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


@pytest.mark.parametrize("tile", [TILE, TMA], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("rows_are_last", [True, False])
def test_row_gemm(rows_are_last, tile):
    """Gathered, scattered, scaled, with an adapter and a bias; both ways a matrix may lie."""
    num_k, num_cols, rank = 48, 40, 5
    routing, experts = build_routing(), expert_of_row()
    x, weights = draw(NUM_TOKENS, num_k), draw(3, num_k, num_cols, seed=1)
    lora_rows, factor = draw(routing.num_rows, rank, seed=2), draw(3, rank, num_cols, seed=3)
    bias = draw(3, num_cols, seed=4)
    stored = weights.transpose(1, 2).contiguous() if rows_are_last else weights
    seen = row_gemm(
        x,
        Matrix(stored, rows_are_last),
        routing,
        tile,
        gather=True,
        scatter=True,
        scale=0.5,
        lora=LoraRows(lora_rows, Matrix(factor, rows_are_last=False)),
        bias=bias,
    )
    product = torch.einsum(
        "nk,nkc->nc", x[routing.order // TOP_K].double(), weights[experts].double()
    )
    wanted = 0.5 * product + bias[experts].double()
    wanted += torch.einsum("nr,nrc->nc", lora_rows.double(), factor[experts].double())
    by_row = torch.empty_like(wanted)
    by_row[routing.order] = wanted
    assert relative_error(seen, by_row) < BOUND


def test_row_gemm_of_sorted_rows():
    routing, experts = build_routing(), expert_of_row()
    x, weights = draw(routing.num_rows, 40), draw(3, 40, 24, seed=1)
    seen = row_gemm(x, Matrix(weights, rows_are_last=False), routing, TILE)
    wanted = torch.einsum("nk,nkc->nc", x.double(), weights[experts].double())
    assert relative_error(seen, wanted) < BOUND


@pytest.mark.parametrize("tile", [TILE, TMA], ids=["pointers", "descriptors"])
def test_gate_up(tile):
    hidden_size, intermediate_size = 48, 40
    routing, experts = build_routing(), expert_of_row()
    tokens, weights = draw(NUM_TOKENS, hidden_size), draw(3, 2 * intermediate_size, hidden_size)
    weights = weights * hidden_size**-0.5
    layout = GateLayout(SWIGLU, is_interleaved=False)
    matrix = Matrix(weights, rows_are_last=True)
    seen, gate_up_out = gate_up(tokens, matrix, routing, tile, layout, keeps_gate_up_out=True)
    wanted = torch.einsum(
        "nh,noh->no", tokens[routing.order // TOP_K].double(), weights[experts].double()
    )
    gate, up = wanted.chunk(2, dim=-1)
    assert relative_error(gate_up_out, wanted) < BOUND
    assert relative_error(seen, silu(gate) * up) < BOUND
    again, nothing = gate_up(tokens, matrix, routing, tile, layout, keeps_gate_up_out=False)
    assert torch.equal(again, seen)
    assert nothing is None


@pytest.mark.parametrize("tile", [TILE, TMA], ids=["pointers", "descriptors"])
def test_gate_backward(tile):
    """Autograd in fp64 of sum over slots of weight * gate(gate_up_out) @ down."""
    hidden_size, intermediate_size = 48, 40
    routing, experts = build_routing(), expert_of_row()
    grad, weights = draw(NUM_TOKENS, hidden_size), draw(3, hidden_size, intermediate_size, seed=1)
    gate_up_out = draw(routing.num_rows, 2 * intermediate_size, seed=2)
    top_k_weights = draw(NUM_TOKENS, TOP_K, seed=3).sigmoid()
    layout = GateLayout(SWIGLU, is_interleaved=False)
    seen = gate_backward(
        grad,
        Matrix(weights, rows_are_last=False),
        gate_up_out,
        top_k_weights,
        routing,
        tile,
        layout,
        wanted=Wanted(gate_up_out=True, weighted=True, top_k_weights=True),
    )
    leaf = gate_up_out.double().requires_grad_()
    by_row = top_k_weights.double().reshape(-1).requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    weighted = silu(gate) * up * by_row[routing.order].unsqueeze(1)
    output = torch.einsum("nf,nhf->nh", weighted, weights[experts].double())
    grads = torch.autograd.grad(output, [leaf, by_row], grad[routing.order // TOP_K].double())
    assert relative_error(seen.weighted, weighted.detach()) < BOUND
    assert relative_error(seen.gate_up_out, grads[0]) < BOUND
    assert relative_error(seen.top_k_weights, grads[1]) < BOUND
    thrifty = gate_backward(
        grad,
        Matrix(weights, rows_are_last=False),
        gate_up_out,
        top_k_weights,
        routing,
        tile,
        layout,
        wanted=Wanted(gate_up_out=True, weighted=False, top_k_weights=False),
    )
    assert torch.equal(thrifty.gate_up_out, seen.gate_up_out)
    assert thrifty.weighted is None
    assert thrifty.top_k_weights is None


@pytest.mark.parametrize("num_programs", [1, 1000], ids=["whole", "shared out"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_weight_grad(num_programs, is_transposed):
    """An expert with 150 rows, one with none, one with fewer than a share; sides of 40 and 20."""
    counts = [150, 0, 6]
    routing, experts = build_routing(counts, top_k=2), expert_of_row(counts)
    x, y = draw(routing.num_rows // 2, 40), draw(routing.num_rows, 20, seed=1)
    out = torch.full((3, 20, 40) if is_transposed else (3, 40, 20), torch.nan)
    seen = weight_grad(
        Operand(x, by_token=True),
        Operand(y),
        out,
        routing,
        TILE,
        num_programs=num_programs,
        is_transposed=is_transposed,
    )
    gathered = x[routing.order // 2].double()
    wanted = torch.stack(
        [gathered[experts == e].T @ y[experts == e].double() for e in range(len(counts))]
    )
    if is_transposed:
        wanted = wanted.transpose(1, 2)
    # Sums of up to 150 products: errors grow with the root of their number, not with the number.
    assert relative_error(seen, wanted) < BOUND
    assert torch.equal(seen[1], torch.zeros_like(seen[1]))


@pytest.mark.parametrize("has_weights", [False, True])
def test_combine_adds_in_fp32(has_weights):
    """256 + 1 + 1 is 258 in fp32 and stays 256 when each sum is rounded to bf16."""
    rows = torch.tensor([256.0, 1.0, 1.0]).bfloat16().repeat_interleave(2100).view(3, 2100)
    weights = torch.ones(1, 3) if has_weights else None
    assert torch.equal(combine(rows, weights, 3), torch.full((1, 2100), 258.0).bfloat16())


def test_combine_weights_each_slot():
    rows, weights = draw(NUM_TOKENS * TOP_K, 20), draw(NUM_TOKENS, TOP_K, seed=1)
    wanted = torch.einsum("tkh,tk->th", rows.view(NUM_TOKENS, TOP_K, 20).double(), weights.double())
    assert relative_error(combine(rows, weights, TOP_K), wanted) < BOUND
    assert combine(rows, None, 1) is rows


def test_a_layer_with_weights_loaded_by_descriptors():
    """Sums of whole boxes are; the second projection's 40 columns are not, and fall to pointers.

    Two programs walk the tiles of the kernels that have a walk.
    """
    case, walk = LayerCase(5, 32, 40, rank=4), replace(TMA, programs_per_processor=2)
    tiles = TileTable(walk, walk, replace(walk, block_n=16), TMA, TILE)
    assert_equals_obvious(case, lambda *args: run_experts_triton(*args, tiles=tiles), torch.float32)


def test_descriptors_are_for_whole_boxes_and_even_lines():
    fits = Matrix(torch.zeros(2, 40, 48), rows_are_last=True)
    assert fits.uses_tma(TMA)
    assert not fits.uses_tma(TILE)
    assert not Matrix(torch.zeros(2, 48, 40), rows_are_last=True).uses_tma(TMA)  # 40 of 16
    assert not Matrix(torch.zeros(2, 48, 42), rows_are_last=False).uses_tma(TMA)  # 168 bytes
    assert not Matrix(torch.zeros(2, 48, 40).mT, rows_are_last=True).uses_tma(TMA)


def test_tiles_are_at_most_one_a_row_and_never_too_few():
    for counts in ([0, 0], [1, 1, 1], [33, 0, 1], [16, 16], [200, 3, 17, 31]):
        routing = build_routing(counts, top_k=1)
        needed = sum(-(-count // 16) for count in counts)
        assert needed <= routing.num_tiles(16) <= min(sum(counts), needed + len(counts))


@pytest.mark.parametrize(("setting", "precision"), [("tf32", "tf32"), ("ieee", "ieee")])
def test_tf32_as_training_arguments_set_it(setting, precision, monkeypatch):
    """Which sets it for all of torch; the older getter then raises."""
    monkeypatch.setattr(torch.backends, "fp32_precision", setting)
    assert compile_options(TILE)["PRECISION"] == precision
    monkeypatch.undo()
    assert compile_options(TILE)["PRECISION"] == "ieee"


def test_every_kernel_says_whether_products_and_sums_are_fused(monkeypatch):
    """Triton 3.9 warns on every rank where it is left out, and 3.10 takes the other way."""
    launched, launch = {}, GridExecutor.__call__

    def record(executor, *args, **options):
        launched.setdefault(executor.fn.__name__, set()).add(options.pop("enable_fp_fusion", None))
        return launch(executor, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", record)
    assert_equals_obvious(LayerCase(1, 16, 16, num_experts=2), run_experts_triton, torch.float32)
    names = ("gate_up", "row_gemm", "gate_backward", "weight_grad", "combine")
    assert launched == {f"{name}_kernel": {True} for name in names}
