"""The adapter to megablocks: on the package where it runs, and on stand-ins everywhere else.

On a CPU the package's gather and scatter run in Triton's interpreter and its grouped_gemm in plain
torch, from the unpacked sources of megablocks, stanford-stk and grouped_gemm:

    PYTHONPATH=.:<megablocks>:<stk>:<grouped_gemm>:tests/support/stand_ins/cuda_extensions \
        TRITON_INTERPRET=1 python -m pytest tests/kernels/backends/test_megablocks.py
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
from megablocks_utils.kernels.backends.megablocks import MEGABLOCKS, run_experts_megablocks
from megablocks_utils.kernels.gate import SWIGLU
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

ROOT = Path(__file__).parents[3]


@pytest.fixture
def stand_in():
    with stand_ins():
        yield "cpu", torch.bfloat16


@pytest.fixture
def source(request, monkeypatch):
    """Device and dtype of the real package, or of the stand-ins where it cannot run."""
    if not MEGABLOCKS.is_installed():
        return request.getfixturevalue("stand_in")
    if torch.cuda.is_available():
        return "cuda", torch.bfloat16
    if os.environ.get("TRITON_INTERPRET") != "1":
        return request.getfixturevalue("stand_in")
    from megablocks.backend import kernels

    for kernel in (kernels._padded_copy, kernels._padded_copy_wgrad):
        # The interpreter cannot time configurations to choose one.
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
    return "cpu", torch.float32


SMALL = draw_case(draw_index(7, 5, 2), 5, 24, 40)
ONE_EACH = draw_case(draw_index(11, 5, 1), 5, 24, 40)
NO_TOKEN = draw_case(draw_index(0, 4, 1), 4, 16, 24)
WEIGHTS = ("gate_up_proj", "down_proj")
CASES = {
    "an expert without rows": (SMALL, ()),
    "frozen": (SMALL, WEIGHTS),
    "first projection frozen": (SMALL, WEIGHTS[:1]),
    "second projection and tokens frozen": (SMALL, (*WEIGHTS[1:], "tokens")),
    "no token": (NO_TOKEN, ()),
    "beyond blocks of 64": (draw_case(draw_index(20, 3, 2), 3, 136, 72), ()),
    "rows received": (as_received(ONE_EACH, is_sorted=False), ()),
    "rows received in order, frozen": (as_received(ONE_EACH, is_sorted=True), WEIGHTS),
    "no row received": (as_received(NO_TOKEN, is_sorted=True), ()),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference_in_values_and_gradients(source, name):
    device, dtype = source
    case, frozen = CASES[name]
    assert_equals_reference(case, run_experts_megablocks, dtype, frozen=frozen, device=device)


def test_storage_equals_the_loop(source):
    device, dtype = source
    case = with_storage(SMALL, is_transposed=True, is_interleaved=True)
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
    return ExpertWeights(make(4, 192, 64), make(4, 64, 96), SWIGLU)


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


def test_without_its_cuda_extensions_it_is_not_installed(stand_in, monkeypatch):
    assert MEGABLOCKS.is_installed()
    monkeypatch.setitem(sys.modules, "grouped_gemm_backend", None)
    assert not MEGABLOCKS.is_installed()


def test_the_versions_are_those_of_the_requirements():
    text = (ROOT / "requirements-kernels.txt").read_text()
    versions = [word for word in MEGABLOCKS.install.split() if "==" in word]
    assert len(versions) == 3
    assert all(version in text for version in versions)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (
            {"down_lora": LowRank(torch.zeros(4, 8, 96), torch.zeros(4, 64, 8), 1.0)},
            "kernel is megablocks, but megablocks does not support LoRA on experts; kernel eager, "
            "grouped_mm or triton does.",
        ),
        (
            {"down_bias": torch.zeros(4, 64)},
            "kernel is megablocks, but megablocks does not support biases of experts; kernel "
            "eager, grouped_mm, triton or scattermoe does.",
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
        "kernel is megablocks, which counts in 32 bits, but 524288 rows of 4096 have more than "
        "2147483647 elements; kernel triton counts in 64."
    )
    megablocks._check_can_run(2 * 262_143, 4_096, draw_experts())
