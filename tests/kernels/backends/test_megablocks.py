"""The adapter to megablocks: on stand-ins everywhere, on the package where it runs.

On a CPU the package's gather and scatter run in Triton's interpreter and its grouped_gemm in plain
torch, from the unpacked sources of megablocks, stanford-stk and grouped_gemm:

    PYTHONPATH=.:<megablocks>:<stk>:<grouped_gemm>:tests/support/stand_ins/cuda_extensions \
        TRITON_INTERPRET=1 python -m pytest -rs tests/kernels/test_megablocks.py
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
from megablocks_utils.kernels.backends import megablocks
from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.backends.megablocks import (
    MEGABLOCKS_INSTALL,
    find_megablocks_unsupported_reason,
    is_megablocks_installed,
    run_experts_megablocks,
)
from megablocks_utils.kernels.gate import SwiGlu
from megablocks_utils.kernels.permute import ExpertOrder, sort_by_expert
from megablocks_utils.kernels.weights import ExpertWeights, LowRank
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
        yield "cpu", torch.bfloat16


@pytest.fixture
def package(monkeypatch):
    if not is_megablocks_installed():
        pytest.skip(f"megablocks is not installed: {MEGABLOCKS_INSTALL}")
    if torch.cuda.is_available():
        return "cuda", torch.bfloat16
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1")
    from megablocks.backend import kernels

    for kernel in (kernels._padded_copy, kernels._padded_copy_wgrad):
        # The interpreter cannot time configurations to choose one.
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
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
    "beyond blocks of 64": draw_case(draw_index(20, 3, 2), 3, 136, 72),
    "rows received": as_received(ONE_EACH, is_sorted=False),
    "rows received in order": as_received(ONE_EACH, is_sorted=True),
    "no row received": as_received(NO_TOKEN, is_sorted=True),
}
WEIGHTS = ("gate_up_proj", "down_proj")


@pytest.mark.parametrize("frozen", [(), WEIGHTS, WEIGHTS[:1], (*WEIGHTS[1:], "tokens")])
@pytest.mark.parametrize("name", CASES)
def test_equals_reference_in_values_and_gradients(source, name, frozen):
    device, dtype = source
    assert_equals_reference(
        CASES[name], run_experts_megablocks, dtype, frozen=frozen, device=device
    )


@pytest.mark.parametrize("storage", ["is_transposed", "is_interleaved"])
def test_storage_equals_the_loop(source, storage):
    device, dtype = source
    case = with_storage(SMALL, **{storage: True})
    leaves = {name: leaf for name, leaf in case.leaves.items() if not name.endswith("_bias")}
    assert_equals_reference(
        replace(case, leaves=leaves),
        run_experts_megablocks,
        dtype,
        reference=run_experts_eager,
        device=device,
    )


def test_strides_of_tokens_weights_and_gradient(source):
    """The package's kernels know no strides; here nothing lies as its shape says."""
    device, dtype = source
    leaves = {name: SMALL.leaves[name].T.contiguous().T for name in ("tokens", "top_k_weights")}
    upstream = torch.ones(()).expand_as(leaves["tokens"])
    case = replace(SMALL, leaves=SMALL.leaves | leaves, upstream=upstream)
    assert_equals_reference(case, run_experts_megablocks, dtype, device=device)


def test_one_expert_a_token(source):
    """Routing weights with strides; and a result that is no view, of which FSDP2 would warn."""
    device, dtype = source
    weights = torch.rand(3, 2, device=device)[:, :1]
    order = sort_by_expert(torch.tensor([[0], [2], [1]], device=device), 4)
    tokens = torch.ones(3, 64, device=device, dtype=dtype)
    experts = draw_experts(device, dtype)
    run_weighted = partial(run_experts_megablocks, tokens, order, experts=experts)
    output = run_weighted(weights)
    assert torch.equal(output, run_weighted(weights.contiguous()))
    assert not output._is_view()


def test_strides_of_what_a_gate_returns(stand_in):
    """grouped_gemm looks at them in forward only."""

    def by_columns(gate, up):
        return (gate * up).T.contiguous().T

    experts = draw_experts()
    wanted, seen = (run(replace(experts, gate=gate)) for gate in (torch.mul, by_columns))
    assert torch.equal(seen, wanted)


def draw_experts(device="cpu", dtype=torch.bfloat16):
    """Return 4 trained experts of sizes 64 and 96."""
    make = partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
    return ExpertWeights(make(4, 192, 64), make(4, 64, 96), SwiGlu())


def run(experts, top_k_weights=None):
    """Run three tokens of ones, each through experts 0 and 2."""
    weight = experts.gate_up_proj
    tokens = torch.ones(3, 64, device=weight.device, dtype=weight.dtype, requires_grad=True)
    index = torch.tensor([[0, 2]], device=weight.device).repeat(3, 1)
    if top_k_weights is None:
        top_k_weights = torch.ones_like(index, dtype=weight.dtype)
    return run_experts_megablocks(tokens, sort_by_expert(index, 4), top_k_weights, experts)


def test_fp32_routing_weights_of_bf16_tokens(source):
    device, dtype = source
    weights = torch.rand(3, 2, device=device, requires_grad=True)
    output = run(draw_experts(device, dtype), weights)
    assert output.dtype == dtype
    output.sum().backward()
    assert weights.grad.dtype == torch.float32


def test_importing_the_adapter_imports_no_package(stand_in):
    runpy.run_path(megablocks.__file__)
    assert not {"megablocks", "grouped_gemm", "stk"} & sys.modules.keys()


@pytest.mark.parametrize("missing", ["megablocks", "megablocks_ops", "grouped_gemm_backend", "stk"])
def test_whether_it_is_installed_with_its_extensions(stand_in, monkeypatch, missing):
    assert is_megablocks_installed()
    monkeypatch.setitem(sys.modules, missing, None)
    assert not is_megablocks_installed()


def test_the_versions_are_those_of_the_requirements():
    text = (ROOT / "requirements-kernels.txt").read_text()
    versions = [word for word in MEGABLOCKS_INSTALL.split() if "==" in word]
    assert len(versions) == 3
    assert all(version in text for version in versions)


@pytest.mark.parametrize(
    ("dtype", "device_type", "has_adapters", "unsupported_reason"),
    [
        (torch.bfloat16, "cuda", False, None),
        (
            torch.float32,
            "cuda",
            False,
            "megablocks' grouped_gemm takes bfloat16 only, and the dtype of compute is float32",
        ),
        (torch.bfloat16, "cpu", False, "megablocks needs a CUDA device, and the device is cpu"),
        (
            torch.bfloat16,
            "cuda",
            True,
            "megablocks does not support LoRA on experts; --kernel triton and grouped_mm do",
        ),
    ],
)
def test_obstacles(monkeypatch, dtype, device_type, has_adapters, unsupported_reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert (
        find_megablocks_unsupported_reason(64, 96, dtype, device_type, has_adapters)
        == unsupported_reason
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    old = unsupported_reason or "megablocks needs compute capability 8.0 or newer"
    assert find_megablocks_unsupported_reason(64, 96, dtype, device_type, has_adapters) == old


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (
            {"down_lora": LowRank(torch.zeros(4, 8, 96), torch.zeros(4, 64, 8), 1.0)},
            "--kernel is megablocks, but megablocks does not support LoRA on experts; --kernel "
            "triton and grouped_mm do.",
        ),
        (
            {"down_bias": torch.zeros(4, 64)},
            "--kernel is megablocks, which has no biases of experts, but these experts have them; "
            "--kernel triton and grouped_mm add them.",
        ),
    ],
)
def test_what_the_package_has_not_is_refused(what, sentence):
    with pytest.raises(ConfigurationError) as refusal:
        run(replace(draw_experts(), **what))
    assert str(refusal.value) == sentence


def test_rows_beyond_32_bits_are_refused():
    """Mixtral's hidden size; a token less and the check is passed."""
    order = ExpertOrder(None, None, torch.empty(4), top_k=2)
    with pytest.raises(ConfigurationError) as refusal:
        run_experts_megablocks(
            torch.empty(262_144, 4_096, device="meta"), order, None, draw_experts()
        )
    assert str(refusal.value) == (
        "--kernel is megablocks, which counts in 32 bits, but 524288 rows of 4096 have more than "
        "2147483647 elements; --kernel triton counts in 64."
    )
    megablocks._check_can_run(2 * 262_143, 4_096, draw_experts())
