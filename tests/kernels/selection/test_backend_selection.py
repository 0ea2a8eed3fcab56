"""The choice of a backend, and each backend against the obvious loop."""

import pickle
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.gate import SwiGlu
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.selection.backend_selection import (
    BackendSelection,
    ExpertShapes,
    select_and_load_backend,
    select_backend,
)
from megablocks_utils.kernels.tuning.measurements import Measurements, store_entry
from megablocks_utils.kernels.weights import ExpertWeights, LowRank
from megablocks_utils.moe.reference import experts_reference
from tests.kernels.facts import CPU, H100, INTERPRETER, V100, put_triton
from tests.kernels.measured import SHAPES, TILES, measured
from tests.support.allocations import LargestResult
from tests.support.compare import relative_error


def sorted_rows(counts):
    """Return the order of rows that lie in expert order."""
    return ExpertOrder(None, None, torch.tensor(counts), top_k=1)


FITTING = ExpertShapes(64, 96, torch.float32, "cpu")


def test_auto_takes_grouped_mm_where_the_shapes_fit():
    choice = select_and_load_backend("auto", FITTING)
    assert choice.name == "grouped_mm"
    assert choice.reason == "auto: torch.nn.functional.grouped_mm runs these shapes"


@pytest.mark.parametrize(
    ("shapes", "unsupported_reason"),
    [
        (
            ExpertShapes(64, 90, torch.float32, "cpu"),
            "torch's grouped_mm needs intermediate_size (90) to be a multiple of 4 in float32",
        ),
        (
            ExpertShapes(68, 96, torch.bfloat16, "cpu"),
            "torch's grouped_mm needs hidden_size (68) to be a multiple of 8 in bfloat16",
        ),
        (
            ExpertShapes(64, 96, torch.float64, "cpu"),
            "torch's grouped_mm does not take float64",
        ),
    ],
)
def test_shapes_grouped_mm_cannot_run(shapes, unsupported_reason):
    choice = select_and_load_backend("auto", shapes, CPU)
    assert (choice.name, choice.reason) == ("eager", f"auto: {unsupported_reason}")
    with pytest.raises(ConfigurationError) as refusal:
        select_and_load_backend("grouped_mm", shapes, CPU)
    assert str(refusal.value) == (
        f"--kernel is grouped_mm, but {unsupported_reason}; --kernel eager works."
    )


WHY = "torch.nn.functional.grouped_mm runs these shapes"
FASTER = (
    "triton was measured faster than grouped_mm, 12.00 ms to 20.50 ms a layer (2026-01-02, NVIDIA "
    "H100 80GB HBM3, torch 2.13.0, triton 3.9.0, about 32,768 rows)"
)
SLOWER = (
    "grouped_mm was measured faster than triton, 20.50 ms to out of memory a layer (2026-01-02, "
    "NVIDIA H100 80GB HBM3, torch 2.13.0, triton 3.9.0, about 32,768 rows)"
)
GAP = (
    "triton was not measured here for these experts, lora, with about 32,768 rows (python -m "
    "megablocks_utils.tune does it)"
)
UNSHIPPED = ", and none are shipped yet"
SLOW = measured(winner="grouped_mm", triton_ms=None)
AUTO_ON_CUDA = {
    "nothing was measured": (Measurements(), "grouped_mm", f"{WHY}; {GAP}{UNSHIPPED}"),
    "triton won here": (Measurements((measured(),)), "triton", FASTER),
    "triton won elsewhere": (Measurements((), (measured(),)), "triton", FASTER),
    "grouped_mm won here": (Measurements((SLOW,), (measured(),)), "grouped_mm", SLOWER),
    "another mode was measured": (
        Measurements((measured(replace(SHAPES, mode="full")),), (SLOW,)),
        "grouped_mm",
        SLOWER,
    ),
    "other experts are shipped": (
        Measurements((), (measured(replace(SHAPES, top_k=1)),)),
        "grouped_mm",
        f"{WHY}; {GAP}",
    ),
    "the file is damaged": (
        Measurements((), (), "FILE is damaged"),
        "grouped_mm",
        f"{WHY}; {GAP}{UNSHIPPED}; FILE is damaged",
    ),
    "the file is damaged, and one is shipped": (
        Measurements((), (measured(),), "FILE is damaged"),
        "triton",
        f"{FASTER}; FILE is damaged",
    ),
}


@pytest.mark.parametrize("case", AUTO_ON_CUDA)
def test_auto_on_cuda_goes_by_what_was_measured(case, monkeypatch):
    put_triton(monkeypatch)
    measurements, name, reason = AUTO_ON_CUDA[case]
    decision = select_backend("auto", SHAPES, H100, measurements)
    assert decision.name == name
    assert decision.reason == f"auto: {reason}"
    assert decision.tiles == (TILES if name == "triton" else None)


def test_auto_on_cuda_where_triton_cannot_run(monkeypatch):
    won = Measurements((measured(),), (measured(),))
    put_triton(monkeypatch, is_installed=False)
    decision = select_backend("auto", SHAPES, H100, won)
    reason = f"auto: {WHY}; triton is not installed (pip install triton)"
    assert (decision.name, decision.reason) == ("grouped_mm", reason)
    put_triton(monkeypatch)
    decision = select_backend("auto", SHAPES, V100, won)
    assert (decision.name, decision.reason) == (
        "eager",
        "auto: torch's grouped_mm needs compute capability 8.0 or newer; our Triton kernels need "
        "compute capability 8.0 or newer, and Tesla V100 has 7.0",
    )


def test_auto_without_a_number_of_rows(monkeypatch):
    put_triton(monkeypatch)
    shapes = replace(SHAPES, num_rows=None)
    assert select_backend("auto", shapes, H100, Measurements((measured(),))).reason == (
        f"auto: {WHY}; how many rows the experts get is not known, so no measurement was looked up"
    )


def test_auto_on_a_cpu_reads_no_file(monkeypatch, tmp_path):
    (tmp_path / "kernels.json").write_text("damaged")
    monkeypatch.setenv("MEGABLOCKS_UTILS_CACHE", str(tmp_path))
    for device in (CPU, INTERPRETER):
        shapes = replace(SHAPES, device_type="cpu")
        assert select_backend("auto", shapes, device).reason == f"auto: {WHY}"


@pytest.mark.parametrize(
    ("measurements", "reason", "tiles"),
    [
        (Measurements(), "", None),
        (Measurements((SLOW,)), ", with the tiles measured 2026-01-02", TILES),
        (Measurements((), (), "FILE is damaged"), "; FILE is damaged", None),
    ],
)
def test_triton_by_name_takes_its_tiles_also_where_it_lost(
    measurements, reason, tiles, monkeypatch
):
    put_triton(monkeypatch)
    decision = select_backend("triton", SHAPES, H100, measurements)
    wanted = BackendSelection("triton", f"named by --kernel{reason}", tiles)
    assert decision == wanted == pickle.loads(pickle.dumps(decision))


def test_this_machines_file_is_read(monkeypatch, tmp_path):
    put_triton(monkeypatch)
    monkeypatch.setenv("MEGABLOCKS_UTILS_CACHE", str(tmp_path))
    assert select_backend("auto", SHAPES, H100).name == "grouped_mm"
    store_entry(measured(), tmp_path / "kernels.json")
    choice = select_and_load_backend("auto", SHAPES, H100)
    assert (choice.name, choice.reason) == ("triton", f"auto: {FASTER}")
    assert choice.run.keywords == {"tiles": TILES}


def test_named_backends_need_no_measurement():
    choice = select_and_load_backend("eager", FITTING)
    assert (choice.name, choice.reason) == ("eager", "named by --kernel")
    assert choice.run is run_experts_eager


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
@pytest.mark.parametrize(
    "counts",
    [
        [3, 0, 5, 1],  # an expert without rows
        [0, 0, 9, 0],  # one hot expert, empty ones before and after
        [0, 0, 0, 0],  # no rows at all
    ],
)
def test_backend_equals_reference_in_values_and_gradients(kernel, dtype, counts):
    """The bound is twice the reference's own error in this dtype against fp64."""
    torch.manual_seed(0)
    leaves = [torch.randn(sum(counts), 64), torch.randn(4, 192, 64), torch.randn(4, 64, 96)]
    experts = torch.arange(4).repeat_interleave(torch.tensor(counts)).unsqueeze(1)
    upstream = torch.randn(sum(counts), 64)

    def run_reference(kind):
        rows, gate_up, down = (leaf.to(kind).requires_grad_() for leaf in leaves)
        weights = torch.ones(len(rows), 1, dtype=kind)
        output = experts_reference(rows, experts, weights, gate_up, down, silu)
        grads = torch.autograd.grad(output, [rows, gate_up, down], upstream.to(kind))
        return [output, *grads]

    rows, gate_up, down = (leaf.to(dtype).requires_grad_() for leaf in leaves)
    weights = ExpertWeights(gate_up, down, SwiGlu())
    output = select_and_load_backend(kernel, FITTING).run(rows, sorted_rows(counts), None, weights)
    seen = [output, *torch.autograd.grad(output, [rows, gate_up, down], upstream.to(dtype))]
    exact, baseline = run_reference(torch.float64), run_reference(dtype)
    for ours, wanted, own in zip(seen, exact, baseline, strict=True):
        assert ours.shape == wanted.shape
        assert relative_error(ours, wanted) <= 2 * relative_error(own, wanted)


SCALING = 0.5


def _draw_lora_case(counts, hidden_size, intermediate_size, rank):
    """Return frozen weights, then rows and adapters: the leaves that have gradients."""
    generator = torch.Generator().manual_seed(rank)
    shapes = [
        (4, 2 * intermediate_size, hidden_size),
        (4, hidden_size, intermediate_size),
        (sum(counts), hidden_size),
        (4, rank, hidden_size),
        (4, 2 * intermediate_size, rank),
        (4, rank, intermediate_size),
        (4, hidden_size, rank),
    ]
    scales = [hidden_size**-0.5, intermediate_size**-0.5, 1.0, *[0.3] * 4]
    drawn = [
        torch.randn(shape, generator=generator) * scale
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    return drawn[:2], drawn[2:]


def _run_lora(run, weights, leaves, counts, dtype, upstream):
    gate_up, down = (weight.to(dtype) for weight in weights)
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    rows, gate_up_a, gate_up_b, down_a, down_b = leaves
    experts = ExpertWeights(
        gate_up,
        down,
        SwiGlu(),
        gate_up_lora=LowRank(gate_up_a, gate_up_b, SCALING),
        down_lora=LowRank(down_a, down_b, SCALING),
    )
    output = run(rows, sorted_rows(counts), None, experts)
    return [output, *torch.autograd.grad(output, leaves, upstream.to(dtype))]


def _merge_and_run(rows, order, _top_k_weights, experts):
    """Do it the obvious way: add B A to the weights and call the reference."""
    index = torch.arange(4).repeat_interleave(order.tokens_per_expert).unsqueeze(1)
    first, second = experts.gate_up_lora, experts.down_lora
    gate_up = experts.gate_up_proj + SCALING * first.lora_b @ first.lora_a
    down = experts.down_proj + SCALING * second.lora_b @ second.lora_a
    weights = torch.ones(len(rows), 1, dtype=rows.dtype)
    return experts_reference(rows, index, weights, gate_up, down, silu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
@pytest.mark.parametrize("rank", [1, 4, 16])  # 1 and 4 are padded in bfloat16, 1 in float32
@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ([3, 0, 5, 1], (64, 96)),
        ([0, 0, 0, 0], (64, 96)),
        ([0, 140, 0, 3], (272, 328)),  # rows, rows and columns beyond tiles of 128 and 256
    ],
)
def test_adapters_equal_merged_weights_in_values_and_gradients(kernel, dtype, counts, sizes, rank):
    """The bound is twice the merged reference's own error in this dtype against fp64."""
    weights, leaves = _draw_lora_case(counts, *sizes, rank)
    upstream = torch.randn(sum(counts), sizes[0], generator=torch.Generator().manual_seed(1))
    run = select_and_load_backend(kernel, ExpertShapes(*sizes, dtype, "cpu")).run
    seen = _run_lora(run, weights, leaves, counts, dtype, upstream)
    exact = _run_lora(_merge_and_run, weights, leaves, counts, torch.float64, upstream)
    own = _run_lora(_merge_and_run, weights, leaves, counts, dtype, upstream)
    for ours, wanted, baseline in zip(seen, exact, own, strict=True):
        assert ours.shape == wanted.shape
        assert relative_error(ours, wanted) <= 2 * relative_error(baseline, wanted)


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
def test_adapters_never_make_a_tensor_of_the_weights_size(kernel):
    """Neither W + B A nor a gradient of W: with few rows nothing is as large as one expert's W."""
    counts, sizes = [2, 0, 1, 1], (256, 256)
    weights, leaves = _draw_lora_case(counts, *sizes, rank=4)
    run = select_and_load_backend(kernel, ExpertShapes(*sizes, torch.float32, "cpu")).run
    upstream = torch.ones(sum(counts), sizes[0])
    with LargestResult() as ours:
        _run_lora(run, weights, leaves, counts, torch.float32, upstream)
    with LargestResult() as merged:
        _run_lora(_merge_and_run, weights, leaves, counts, torch.float32, upstream)
    assert ours.num_elements == leaves[2].numel()  # the gradient of gate_up's B, 4 x 512 x 4
    assert ours.num_elements < weights[1][0].numel()
    assert merged.num_elements == weights[0].numel()
