"""With rows from other ranks, what sums them is checked too, where a kernel of its own does it."""

from types import SimpleNamespace

import pytest
import torch

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.backends.grouped_mm import run_experts_grouped_mm
from megablocks_utils.kernels.fused import unpermute
from megablocks_utils.kernels.gate import SWIGLU
from megablocks_utils.kernels.weights import ExpertWeights
from megablocks_utils.moe import kernel_check


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
