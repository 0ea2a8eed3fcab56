"""The check of a kernel: of what sums rows of other ranks, and on experts as they are packed."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.backends.grouped_mm import run_experts_grouped_mm
from megablocks_utils.kernels.backends.packed import run_packed
from megablocks_utils.kernels.fused import unpermute
from megablocks_utils.kernels.gate import SWIGLU
from megablocks_utils.kernels.weights import ExpertWeights
from megablocks_utils.moe import kernel_check
from megablocks_utils.quantization.packed_experts import PackedExperts
from megablocks_utils.quantization.packing import pack_all


def sum_rows(rows, weights, top_k, inverse):
    by_slot = rows[inverse].unflatten(0, (-1, top_k))
    return (by_slot * weights.unsqueeze(-1)).sum(1)


def go_back(grad, rows, weights, inverse, *, wants_rows, wants_weights):
    with torch.enable_grad():
        leaves = rows.detach().requires_grad_(), weights.detach().requires_grad_()
        output = sum_rows(*leaves, weights.shape[1], inverse)
        return torch.autograd.grad(output, leaves, grad)


def forget_a_token(rows, weights, top_k, inverse):
    output = sum_rows(rows, weights, top_k, inverse)
    output[-1] = 0
    return output


def weigh_twice(grad, rows, weights, inverse, **wants):
    by_row, by_weight = go_back(grad, rows, weights, inverse, **wants)
    return by_row * weights.reshape(-1, 1)[inverse.argsort()], by_weight


def probe(monkeypatch, forward, backward):
    """Check experts of two ranks with these kernels, on a CPU."""
    kernels = unpermute.CombineKernels(forward, backward)
    for module in (unpermute, kernel_check):
        monkeypatch.setattr(module, "find_combine_kernels", lambda _device, _dtype: kernels)
    torch.manual_seed(0)
    experts = ExpertWeights(torch.randn(2, 24, 16) / 4, torch.randn(2, 16, 12) / 4, SWIGLU)
    module = SimpleNamespace(
        mesh=SimpleNamespace(mesh_dim_names=("dp", "ep"), size=lambda dim: dim + 1),
        post_expert_norm=None,
        weight_format=None,
        backend=run_experts_grouped_mm,
        stored_weights=lambda: experts,
    )
    return kernel_check._probe("grouped_mm", module, torch.float32)


def test_right_kernels_pass(monkeypatch):
    assert probe(monkeypatch, sum_rows, go_back).ratio <= 2


@pytest.mark.parametrize(
    ("forward", "backward", "tensor"),
    [(forget_a_token, go_back, "output"), (sum_rows, weigh_twice, "gradient of tokens")],
)
def test_wrong_kernels_are_found(monkeypatch, forward, backward, tensor):
    with pytest.raises(ConfigurationError, match=rf"sum of its rows.*its {tensor} is off"):
        probe(monkeypatch, forward, backward)


def read_badly(tokens, order, top_k_weights, experts):
    """Take the scales of packed weights for a thousandth more than they are."""
    if isinstance(experts.down_proj, PackedExperts):
        parts = experts.down_proj.parts
        parts = {**parts, "scale_mean": parts["scale_mean"] * 1.001}
        experts = replace(experts, down_proj=experts.down_proj._rebuild(parts, tokens.dtype))
    return run_packed(run_experts_grouped_mm, tokens, order, top_k_weights, experts)


def test_packed_experts_are_checked_as_they_are():
    """Numbers that were made before would say nothing of a kernel that reads codes itself."""
    torch.manual_seed(0)
    weights = torch.randn(3, 24, 64) / 8, torch.randn(3, 64, 12) / 4
    packed = [pack_all("nf4", tensor, is_transposed=False) for tensor in weights]
    module = SimpleNamespace(
        mesh=SimpleNamespace(mesh_dim_names=("dp", "ep"), size=lambda _: 1),
        post_expert_norm=None,
        weight_format="nf4",
        backend=partial(run_packed, run_experts_grouped_mm),
        stored_weights=lambda: ExpertWeights(*packed, SWIGLU),
    )
    assert kernel_check._probe("grouped_mm", module, torch.float32).ratio <= 2
    module.backend = read_badly
    with pytest.raises(ConfigurationError, match="fails its check"):
        kernel_check._probe("grouped_mm", module, torch.float32)
