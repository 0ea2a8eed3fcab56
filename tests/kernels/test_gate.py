"""Gates: values against the formulas written out, and recognition by values."""

import math

import pytest
import torch
from torch.nn.functional import silu
from transformers.activations import ACT2FN

from megablocks_utils.kernels.gate import (
    SWIGLU,
    Activation,
    ActivationGate,
    Clamp,
    KnownActivation,
    KnownGate,
    list_activations,
    list_gates,
    recognise_gate,
)
from megablocks_utils.kernels.weights import ExpertWeights
from tests.support.compare import relative_error

BEFORE = KnownGate(clamp=Clamp.BEFORE, limit=3.0)
AFTER = KnownGate(clamp=Clamp.AFTER, limit=3.0)
GPT_OSS = KnownGate(clamp=Clamp.GPT_OSS, limit=3.0, alpha=1.7)


def sigmoid(x):
    return 1 / (1 + math.e**-x)


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        (
            GPT_OSS,
            [
                -9 * sigmoid(-9 * 1.7) * (3 + 1),
                -1 * sigmoid(-1.7) * (-3 + 1),
                2 * sigmoid(2 * 1.7) * (0.5 + 1),
                3 * sigmoid(3 * 1.7) * (1 + 1),
            ],
        ),
        (BEFORE, [-9 * sigmoid(-9) * 3, -sigmoid(-1) * -3, 2 * sigmoid(2) * 0.5, 3 * sigmoid(3)]),
        (AFTER, [-9 * sigmoid(-9) * 3, -sigmoid(-1) * -3, 2 * sigmoid(2) * 0.5, 3]),
    ],
)
def test_clamped_gates_are_the_published_formulas(known, wanted):
    """Values below, within and beyond the limit, for gate and up."""
    gate = torch.tensor([[-9.0, -1.0, 2.0, 9.0]], dtype=torch.float64)
    up = torch.tensor([[9.0, -9.0, 0.5, 1.0]], dtype=torch.float64)
    seen = known(gate, up)
    wanted = torch.tensor([wanted], dtype=torch.float64)
    assert relative_error(seen, wanted) < 1e-15  # a few units of the last place


def test_a_gate_that_cannot_be_is_an_error():
    for wrong in (
        {"limit": 7.0},
        {"clamp": Clamp.BEFORE},
        {"alpha": 1.7},
        {"clamp": Clamp.GPT_OSS, "limit": 7.0, "activation": Activation.GELU_TANH},
    ):
        with pytest.raises(ValueError, match="^clamp is "):
            KnownGate(**wrong)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("silu", Activation.SILU),
        ("gelu_pytorch_tanh", Activation.GELU_TANH),
        ("gelu_new", Activation.GELU_TANH),
        ("relu2", Activation.RELU_SQUARED),
        ("gelu", None),
        ("relu", None),
        ("quick_gelu", None),
    ],
)
def test_activations_are_recognised_by_their_values(name, known):
    own = ACT2FN[name]
    gate = recognise_gate(ActivationGate(own), list_gates())
    alone = recognise_gate(own, list_activations())
    assert gate == (ActivationGate(own) if known is None else KnownGate(known))
    assert alone == (own if known is None else KnownActivation(known))


def clamp_oss(gate, up, limit=7.0, alpha=1.702):
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * gate * torch.sigmoid(alpha * gate)


def clamp_straight_through(gate, up):
    """The values of a clamp with the gradients of none."""
    return (BEFORE(gate, up) - SWIGLU(gate, up)).detach() + SWIGLU(gate, up)


@pytest.mark.parametrize(
    ("own", "known"),
    [
        (clamp_oss, KnownGate(clamp=Clamp.GPT_OSS, limit=7.0, alpha=1.702)),
        (lambda gate, up: silu(gate.clamp(max=7.0)) * up.clamp(-7.0, 7.0), Clamp.BEFORE),
        (lambda gate, up: silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0), Clamp.AFTER),
        (lambda gate, up: (silu(gate.float()) * up.float()).to(gate.dtype), Clamp.NONE),
        (lambda gate, up: silu(gate.clamp(max=7.0)) * up, None),
        (lambda gate, up: silu(gate.clamp(max=7.5)) * up.clamp(-7.0, 7.0), None),
        (lambda gate, up: 7.0 * torch.tanh(silu(gate) * up / 7.0), None),
        (lambda gate, up: clamp_oss(gate, up, limit=150.0), None),
        (clamp_straight_through, None),
    ],
)
def test_gates_are_recognised_among_all_numbers_of_a_module(own, known):
    """Also far beyond values that occur: a limit must not show up in training."""
    if isinstance(known, Clamp):
        limit = math.inf if known is Clamp.NONE else 7.0
        known = KnownGate(clamp=known, limit=limit, in_fp32=known is Clamp.NONE)
    seen = recognise_gate(own, list_gates([3.0, 7.0, 1.702, 64, 0, -1.0, math.inf, math.nan]))
    assert seen == (own if known is None else known)


def test_interleaved_outputs_are_gate_up_gate_up():
    gate_up = torch.tensor([[1.0, 10.0, 2.0, 20.0]])
    weights = torch.empty(1, 4, 3), torch.empty(1, 3, 2)
    product = ExpertWeights(*weights, torch.mul, is_interleaved=True).apply_gate(gate_up)
    assert product.tolist() == [[10.0, 40.0]]
    assert ExpertWeights(*weights, torch.mul).apply_gate(gate_up).tolist() == [[2.0, 200.0]]
