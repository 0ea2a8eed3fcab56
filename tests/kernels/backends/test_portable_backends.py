"""The backends of every machine, `eager` and `grouped_mm`, against the obvious loop."""

import pytest
import torch

from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.backends.grouped_mm import run_experts_grouped_mm
from megablocks_utils.kernels.gate import SWIGLU, Activation, Clamp, KnownActivation, KnownGate
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.weights import ExpertWeights, LowRank
from megablocks_utils.moe.reference import experts_reference
from tests.support.allocations import LargestResult
from tests.support.compare import relative_error
from tests.support.layer_case import LayerCase, assert_equals_obvious

RUNS = {"eager": run_experts_eager, "grouped_mm": run_experts_grouped_mm}


def sorted_rows(counts):
    """Return the order of rows that lie in expert order."""
    return ExpertOrder(None, None, torch.tensor(counts), top_k=1)


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
        output = experts_reference(rows, experts, weights, ExpertWeights(gate_up, down, SWIGLU))
        grads = torch.autograd.grad(output, [rows, gate_up, down], upstream.to(kind))
        return [output, *grads]

    rows, gate_up, down = (leaf.to(dtype).requires_grad_() for leaf in leaves)
    weights = ExpertWeights(gate_up, down, SWIGLU)
    output = RUNS[kernel](rows, sorted_rows(counts), None, weights)
    seen = [output, *torch.autograd.grad(output, [rows, gate_up, down], upstream.to(dtype))]
    exact, baseline = run_reference(torch.float64), run_reference(dtype)
    for ours, wanted, own in zip(seen, exact, baseline, strict=True):
        assert ours.shape == wanted.shape
        assert relative_error(ours, wanted) <= 2 * relative_error(own, wanted)


@pytest.mark.parametrize(
    "gate",
    [
        KnownGate(Activation.GELU_TANH, Clamp.BEFORE, limit=0.7),
        KnownGate(in_fp32=True),
        KnownActivation(Activation.RELU_SQUARED),
    ],
    ids=["clamped", "in fp32", "no gate"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_gate_and_none_with_biases_and_adapters(gate, dtype):
    case = LayerCase(9, 16, 24, rank=4, has_bias=True, is_transposed=True, gate=gate)
    assert_equals_obvious(case, run_experts_grouped_mm, dtype)


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
        SWIGLU,
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
    return experts_reference(rows, index, weights, ExpertWeights(gate_up, down, SWIGLU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
@pytest.mark.parametrize(
    ("counts", "sizes", "rank"),
    [
        ([3, 0, 5, 1], (64, 96), 1),  # padded in both dtypes
        ([3, 0, 5, 1], (64, 96), 4),  # padded in bfloat16
        ([0, 0, 0, 0], (64, 96), 16),
        ([0, 140, 0, 3], (272, 328), 16),  # rows, rows and columns beyond tiles of 128 and 256
    ],
)
def test_adapters_equal_merged_weights_in_values_and_gradients(kernel, dtype, counts, sizes, rank):
    """The bound is twice the merged reference's own error in this dtype against fp64."""
    weights, leaves = _draw_lora_case(counts, *sizes, rank)
    upstream = torch.randn(sum(counts), sizes[0], generator=torch.Generator().manual_seed(1))
    run = RUNS[kernel]
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
    run = RUNS[kernel]
    upstream = torch.ones(sum(counts), sizes[0])
    with LargestResult() as ours:
        _run_lora(run, weights, leaves, counts, torch.float32, upstream)
    with LargestResult() as merged:
        _run_lora(_merge_and_run, weights, leaves, counts, torch.float32, upstream)
    assert ours.num_elements == leaves[2].numel()  # the gradient of gate_up's B, 4 x 512 x 4
    assert ours.num_elements < weights[1][0].numel()
    assert merged.num_elements == weights[0].numel()
