"""The choice of a backend, and each backend against the obvious loop."""

import pytest
import torch
from torch.nn.functional import silu

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.backend import ExpertShapes, choose_backend
from megablocks_utils.moe.reference import experts_reference
from tests.support.compare import relative_error

FITTING = ExpertShapes(64, 96, torch.float32, "cpu")


def test_auto_takes_grouped_mm_where_the_shapes_fit():
    choice = choose_backend("auto", FITTING)
    assert choice.name == "grouped_mm"
    assert choice.reason == "auto: torch.nn.functional.grouped_mm runs these shapes"


@pytest.mark.parametrize(
    ("shapes", "obstacle"),
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
def test_shapes_grouped_mm_cannot_run(shapes, obstacle):
    choice = choose_backend("auto", shapes)
    assert (choice.name, choice.reason) == ("eager", f"auto: {obstacle}")
    with pytest.raises(ConfigurationError) as refusal:
        choose_backend("grouped_mm", shapes)
    assert str(refusal.value) == (f"--kernel is grouped_mm, but {obstacle}; --kernel eager works.")


def test_a_backend_of_a_later_version_is_refused():
    with pytest.raises(ConfigurationError) as refusal:
        choose_backend("triton", FITTING)
    assert str(refusal.value) == (
        "--kernel is triton, but this version has auto, eager, grouped_mm."
    )


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
    output = choose_backend(kernel, FITTING).run(rows, counts, gate_up, down, silu)
    seen = [output, *torch.autograd.grad(output, [rows, gate_up, down], upstream.to(dtype))]
    exact, baseline = run_reference(torch.float64), run_reference(dtype)
    for ours, wanted, own in zip(seen, exact, baseline, strict=True):
        assert ours.shape == wanted.shape
        assert relative_error(ours, wanted) <= 2 * relative_error(own, wanted)
