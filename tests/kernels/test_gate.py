"""Gates: values against the formulas written out, and recognition by values."""

import pytest
import torch
from torch import nn

from megablocks_utils.kernels.gate import ActivationGate, SwiGlu, build_gate, gates_agree
from megablocks_utils.kernels.weights import ExpertWeights
from tests.support.compare import relative_error


def test_clamped_gate_is_the_published_formula():
    """Values below, within and beyond the limit, for gate and up."""
    gate = torch.tensor([[-9.0, -1.0, 2.0, 9.0]], dtype=torch.float64)
    up = torch.tensor([[9.0, -9.0, 0.5, 1.0]], dtype=torch.float64)
    wanted = [
        -9 / (1 + torch.e ** (1.7 * 9)) * (3 + 1),
        -1 / (1 + torch.e**1.7) * (-3 + 1),
        2 / (1 + torch.e ** (-1.7 * 2)) * (0.5 + 1),
        3 / (1 + torch.e ** (-1.7 * 3)) * (1 + 1),
    ]
    seen = SwiGlu(alpha=1.7, limit=3.0)(gate, up)
    wanted = torch.tensor([wanted], dtype=torch.float64)
    assert relative_error(seen, wanted) < 1e-15  # a few units of the last place


@pytest.mark.parametrize(
    "activation", [nn.SiLU(), torch.nn.functional.silu, lambda x: x / (1 + (-x).exp())]
)
def test_silu_is_recognised_by_its_values(activation):
    assert build_gate(activation) == SwiGlu()


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), lambda x: x * (1.01 * x).sigmoid()])
def test_other_activations_are_kept(activation):
    assert build_gate(activation) == ActivationGate(activation)


def test_a_limit_beyond_small_values_is_seen():
    assert not gates_agree(
        SwiGlu(limit=7.0, alpha=1.702), lambda g, u: (u + 1) * g * (1.702 * g).sigmoid()
    )
    assert gates_agree(SwiGlu(limit=7.0, alpha=1.702), SwiGlu(limit=7.0, alpha=1.702))


def test_interleaved_outputs_are_gate_up_gate_up():
    gate_up = torch.tensor([[1.0, 10.0, 2.0, 20.0]])
    weights = torch.empty(1, 4, 3), torch.empty(1, 3, 2)
    product = ExpertWeights(*weights, torch.mul, is_interleaved=True).apply_gate(gate_up)
    assert product.tolist() == [[10.0, 40.0]]
    assert ExpertWeights(*weights, torch.mul).apply_gate(gate_up).tolist() == [[2.0, 200.0]]
