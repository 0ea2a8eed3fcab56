"""The adapter to scattermoe: on a stand-in everywhere, on the package where it runs.

On a CPU the package runs in Triton's interpreter, from a clone of it at the pinned commit:

    PYTHONPATH=.:<clone> TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1 \
        python -m pytest -rs tests/kernels/test_scattermoe.py
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
from megablocks_utils.kernels.backends.scattermoe import (
    SCATTERMOE_INSTALL,
    find_scattermoe_unsupported_reason,
    is_scattermoe_installed,
    run_experts_scattermoe,
)
from megablocks_utils.kernels.gate import SwiGlu
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

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stand_in():
    with stand_ins():
        yield "cpu", torch.float32


@pytest.fixture
def package():
    if not is_scattermoe_installed():
        pytest.skip(f"scattermoe is not installed: {SCATTERMOE_INSTALL}")
    if torch.cuda.is_available():
        return "cuda", torch.bfloat16
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1")
    return "cpu", torch.float32


@pytest.fixture(params=["stand_in", "package"])
def source(request):
    return request.getfixturevalue(request.param)


SMALL = draw_case(draw_index(7, 5, 2), 5, 24, 40)
ONE_EACH = draw_case(draw_index(11, 5, 1), 5, 24, 40)
NO_TOKEN = draw_case(draw_index(0, 4, 1), 4, 16, 24)
CASES = {
    "an expert without rows": SMALL,
    "one token": draw_case(draw_index(1, 4, 3), 4, 16, 24),
    "one expert for all": draw_case(torch.full((9, 1), 2), 4, 16, 24),
    "all experts for each": draw_case(torch.arange(3).repeat(5, 1), 3, 16, 24),
    "no token": NO_TOKEN,
    "beyond tiles of 128": draw_case(draw_index(90, 3, 2), 3, 136, 72),
    "rows received": as_received(ONE_EACH, is_sorted=False),
    "rows received in order": as_received(ONE_EACH, is_sorted=True),
    "no row received": as_received(NO_TOKEN, is_sorted=True),
}
WEIGHTS, BIASES = ("gate_up_proj", "down_proj"), ("gate_up_bias", "down_bias")


@pytest.mark.parametrize("frozen", [(), WEIGHTS, WEIGHTS[:1], WEIGHTS[1:]])
@pytest.mark.parametrize("name", CASES)
def test_equals_reference_in_values_and_gradients(source, name, frozen):
    device, dtype = source
    case = CASES[name]
    assert_equals_reference(case, run_experts_scattermoe, dtype, frozen=frozen, device=device)


@pytest.mark.parametrize("frozen", [(), WEIGHTS, WEIGHTS + BIASES])
@pytest.mark.parametrize("storage", ["", "is_transposed", "is_interleaved"])
def test_biases_and_storage_equal_the_loop(source, storage, frozen):
    device, dtype = source
    assert_equals_reference(
        with_storage(SMALL, **{storage: True} if storage else {}),
        run_experts_scattermoe,
        dtype,
        reference=run_experts_eager,
        frozen=frozen,
        device=device,
    )


@pytest.mark.parametrize("frozen", [(), WEIGHTS])
def test_strides_of_tokens_and_gradient(source, frozen):
    """Tokens that lie by columns, and the gradient of a sum, which is one number expanded."""
    device, dtype = source
    tokens = SMALL.leaves["tokens"].T.contiguous().T
    upstream = torch.ones(()).expand_as(tokens)
    case = replace(SMALL, leaves=SMALL.leaves | {"tokens": tokens}, upstream=upstream)
    assert_equals_reference(case, run_experts_scattermoe, dtype, frozen=frozen, device=device)


def draw_experts(device="cpu", dtype=torch.float32, is_trained=True):
    """Return 4 experts of sizes 64 and 96."""
    make = partial(torch.randn, device=device, dtype=dtype, requires_grad=is_trained)
    return ExpertWeights(make(4, 192, 64), make(4, 64, 96), SwiGlu())


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


@pytest.mark.parametrize("is_trained", [True, False])
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


def test_a_second_backward_pass_is_an_error(package):
    """The first one overwrites what was saved; torch sees it."""
    total = run(draw_experts(*package)).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_the_package_leaves_transformers_alone_and_multiplies_in_fp32(source):
    """On import it would replace forwards of GPT-OSS and Granite; the stand-in would raise."""
    run(draw_experts(*source))
    assert not [name for name in sys.modules if name.startswith("scattermoe.utils")]
    assert sys.modules["scattermoe.kernels.ops"].ALLOW_TF32 is False


def test_importing_the_adapter_imports_no_package(stand_in):
    runpy.run_path(scattermoe.__file__)
    assert "scattermoe" not in sys.modules


def test_whether_it_is_installed(stand_in, monkeypatch):
    assert is_scattermoe_installed()
    monkeypatch.setitem(sys.modules, "scattermoe", None)
    assert not is_scattermoe_installed()


def test_the_install_line_is_that_of_the_requirements():
    requirement = SCATTERMOE_INSTALL.split("'")[1]
    assert requirement in (ROOT / "requirements-kernels.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("dtype", "device_type", "has_adapters", "unsupported_reason"),
    [
        (torch.bfloat16, "cuda", False, None),
        (torch.float32, "cuda", False, None),
        (torch.float64, "cuda", False, "scattermoe does not take float64"),
        (torch.float32, "cpu", False, "scattermoe needs a CUDA device, and the device is cpu"),
        (
            torch.bfloat16,
            "cuda",
            True,
            "scattermoe does not support LoRA on experts; --kernel triton, this project's own "
            "ScatterMoE-style kernels, has the adapters fused",
        ),
    ],
)
def test_obstacles(monkeypatch, dtype, device_type, has_adapters, unsupported_reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert (
        find_scattermoe_unsupported_reason(64, 96, dtype, device_type, has_adapters)
        == unsupported_reason
    )


def test_obstacles_of_an_old_device_and_of_the_interpreter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    find = partial(find_scattermoe_unsupported_reason, 64, 96, has_adapters=False)
    assert find(torch.float16, "cuda") == "scattermoe needs compute capability 8.0 or newer"
    assert find(torch.float32, "cpu") is None
    assert find(torch.bfloat16, "cpu") == (
        "scattermoe in Triton's interpreter takes float32 only, not bfloat16"
    )


def test_adapters_that_come_after_the_choice_are_refused():
    factors = torch.zeros(4, 8, 96), torch.zeros(4, 64, 8)
    with pytest.raises(ConfigurationError) as refusal:
        run(replace(draw_experts(), down_lora=LowRank(*factors, 1.0)))
    assert str(refusal.value) == (
        "--kernel is scattermoe, but scattermoe does not support LoRA on experts; --kernel triton, "
        "this project's own ScatterMoE-style kernels, has the adapters fused."
    )


@pytest.mark.parametrize(
    ("num_experts", "num_tokens", "most"),
    [(8, 37_450, 2 * 37_450 * 28_672), (19, 1, 19 * 28_672 * 4_096)],
)
def test_tensors_beyond_32_bits_are_refused(num_experts, num_tokens, most):
    """Mixtral's sizes; a token less, or an expert less, and the check is passed."""
    shapes = (num_experts, 28_672, 4_096), (num_experts, 4_096, 14_336)
    experts = ExpertWeights(*(torch.empty(shape, device="meta") for shape in shapes), SwiGlu())
    order = ExpertOrder(None, None, torch.empty(num_experts), top_k=2)
    with pytest.raises(ConfigurationError) as refusal:
        run_experts_scattermoe(torch.empty(num_tokens, 0), order, None, experts)
    assert str(refusal.value) == (
        "--kernel is scattermoe, which counts in 32 bits, but a tensor of this layer has "
        f"{most} elements, more than 2147483647; --kernel triton counts in 64."
    )
    scattermoe._check_can_run(
        2 * 37_449, replace(experts, **{k: v[:18] for k, v in experts.tensors.items()})
    )
