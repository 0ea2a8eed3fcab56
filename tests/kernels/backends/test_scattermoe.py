"""The adapter to scattermoe: on the package where it runs, and on a stand-in everywhere else.

On a CPU the package runs in Triton's interpreter, from a clone of it at the pinned commit:

    PYTHONPATH=.:<clone> TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1 \
        python -m pytest tests/kernels/backends/test_scattermoe.py
"""

import os
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.backends import scattermoe
from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.backends.scattermoe import SCATTERMOE, run_experts_scattermoe
from megablocks_utils.kernels.gate import SWIGLU
from megablocks_utils.kernels.permute import ExpertOrder, sort_by_expert
from megablocks_utils.kernels.weights import ExpertWeights, LowRank
from tests.support.allocations import LargestResult
from tests.support.routed_case import (
    as_received,
    assert_equals_reference,
    draw_case,
    draw_index,
    with_storage,
)
from tests.support.stand_ins import stand_ins

ROOT = Path(__file__).parents[3]


@pytest.fixture
def stand_in():
    with stand_ins():
        yield "cpu", torch.float32


@pytest.fixture
def source(request):
    """Device and dtype of the real package, or of the stand-in where it cannot run."""
    if SCATTERMOE.is_installed() and torch.cuda.is_available():
        return "cuda", torch.bfloat16
    if SCATTERMOE.is_installed() and os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu", torch.float32
    return request.getfixturevalue("stand_in")


SMALL = draw_case(draw_index(7, 5, 2), 5, 24, 40)
ONE_EACH = draw_case(draw_index(11, 5, 1), 5, 24, 40)
WEIGHTS, BIASES = ("gate_up_proj", "down_proj"), ("gate_up_bias", "down_bias")
CASES = {
    "an expert without rows": (SMALL, ()),
    "frozen": (SMALL, WEIGHTS),
    "first projection frozen": (SMALL, WEIGHTS[:1]),
    "second projection frozen": (SMALL, WEIGHTS[1:]),
    "no token": (draw_case(draw_index(0, 4, 1), 4, 16, 24), ()),
    "beyond tiles of 128": (draw_case(draw_index(90, 3, 2), 3, 136, 72), ()),
    "rows received": (as_received(ONE_EACH, is_sorted=False), ()),
    "rows received in order, frozen": (as_received(ONE_EACH, is_sorted=True), WEIGHTS),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference_in_values_and_gradients(source, name):
    device, dtype = source
    case, frozen = CASES[name]
    assert_equals_reference(case, run_experts_scattermoe, dtype, frozen=frozen, device=device)


@pytest.mark.parametrize("frozen", [(), WEIGHTS + BIASES])
def test_biases_and_storage_equal_the_loop(source, frozen):
    device, dtype = source
    assert_equals_reference(
        with_storage(SMALL, is_transposed=True, is_interleaved=True),
        run_experts_scattermoe,
        dtype,
        reference=run_experts_eager,
        frozen=frozen,
        device=device,
    )


def test_strides_of_tokens_and_gradient(source):
    """Tokens that lie by columns, and the gradient of a sum, which is one number expanded."""
    device, dtype = source
    tokens = SMALL.leaves["tokens"].T.contiguous().T
    upstream = torch.ones(()).expand_as(tokens)
    case = replace(SMALL, leaves=SMALL.leaves | {"tokens": tokens}, upstream=upstream)
    assert_equals_reference(case, run_experts_scattermoe, dtype, frozen=WEIGHTS, device=device)


def draw_experts(device="cpu", dtype=torch.float32, is_trained=True):
    """Return 4 experts of sizes 64 and 96."""
    make = partial(torch.randn, device=device, dtype=dtype, requires_grad=is_trained)
    return ExpertWeights(make(4, 192, 64), make(4, 64, 96), SWIGLU)


def run(experts, top_k_weights=None):
    """Run three tokens, each through experts 0 and 2."""
    weight = experts.gate_up_proj
    tokens = torch.randn(3, 64, device=weight.device, dtype=weight.dtype, requires_grad=True)
    index = torch.tensor([[0, 2]], device=weight.device).repeat(3, 1)
    if top_k_weights is None:
        top_k_weights = torch.ones_like(index, dtype=weight.dtype)
    return run_experts_scattermoe(tokens, sort_by_expert(index, 4), top_k_weights, experts)


def test_fp32_routing_weights_of_bf16_tokens(stand_in):
    """The package multiplies one dtype only; the gradient has the dtype that was given."""
    weights = torch.rand(3, 2, requires_grad=True)
    output = run(draw_experts(dtype=torch.bfloat16), weights)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert weights.grad.dtype == torch.float32


@pytest.mark.parametrize("is_trained", [True, False])  # two ways to weight and sum the slots
def test_the_result_can_be_added_to_in_place(source, is_trained):
    """Models do so with a residual; FSDP2 warns of a layer that returns a view."""
    output = run(draw_experts(*source, is_trained=is_trained))
    assert not output._is_view()
    output += 1
    output.sum().backward()


@pytest.mark.parametrize("is_trained", [True, False])
def test_frozen_weights_cost_no_gradient_of_their_size(stand_in, is_trained):
    """The package's backward pass makes one whoever wants it, and so does the stand-in."""
    experts = draw_experts(is_trained=is_trained)
    with LargestResult() as largest:
        run(experts).sum().backward()
    assert (largest.num_elements >= experts.down_proj.numel()) == is_trained


def test_the_package_leaves_transformers_alone_and_multiplies_in_fp32(source):
    """On import it would replace forwards of GPT-OSS and Granite; the stand-in would raise."""
    run(draw_experts(*source))
    assert not [name for name in sys.modules if name.startswith("scattermoe.utils")]
    assert sys.modules["scattermoe.kernels.ops"].ALLOW_TF32 is False


def test_importing_the_adapter_imports_no_package(stand_in):
    runpy.run_path(scattermoe.__file__)
    assert "scattermoe" not in sys.modules


def test_the_install_line_is_that_of_the_requirements():
    requirement = SCATTERMOE.install.split("'")[1]
    assert requirement in (ROOT / "requirements-kernels.txt").read_text().splitlines()


def test_adapters_that_come_after_the_choice_are_refused():
    factors = torch.zeros(4, 8, 96), torch.zeros(4, 64, 8)
    with pytest.raises(ConfigurationError) as refusal:
        run(replace(draw_experts(), down_lora=LowRank(*factors, 1.0)))
    assert str(refusal.value) == (
        "kernel is scattermoe, but scattermoe does not support LoRA on experts; kernel eager, "
        "grouped_mm or triton does."
    )


@pytest.mark.parametrize(
    ("num_experts", "num_tokens", "most"),
    [(8, 37_450, 2 * 37_450 * 28_672), (19, 1, 19 * 28_672 * 4_096)],
)
def test_tensors_beyond_32_bits_are_refused(num_experts, num_tokens, most):
    """Mixtral's sizes; a token less, or an expert less, and the check is passed."""
    shapes = (num_experts, 28_672, 4_096), (num_experts, 4_096, 14_336)
    experts = ExpertWeights(*(torch.empty(shape, device="meta") for shape in shapes), SWIGLU)
    order = ExpertOrder(None, None, torch.empty(num_experts), top_k=2)
    with pytest.raises(ConfigurationError) as refusal:
        run_experts_scattermoe(torch.empty(num_tokens, 0), order, None, experts)
    assert str(refusal.value) == (
        "kernel is scattermoe, which counts in 32 bits, but a tensor of this layer has "
        f"{most} elements, more than 2147483647; kernel triton counts in 64."
    )
    scattermoe._check_can_run(
        2 * 37_449, replace(experts, **{k: v[:18] for k, v in experts.tensors.items()})
    )
