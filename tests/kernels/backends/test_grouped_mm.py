"""What the grouped_mm backend does in its own way: the gate, and what it saves."""

import pytest
import torch

from megablocks_utils.kernels.backends import grouped_mm
from megablocks_utils.kernels.backends.grouped_mm import run_experts_grouped_mm
from megablocks_utils.kernels.gate import SWIGLU, ActivationGate, Clamp, KnownGate
from megablocks_utils.kernels.permute import sort_by_expert
from megablocks_utils.kernels.weights import ExpertWeights
from tests.support.layer_case import LayerCase, assert_equals_obvious

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 6, 16, 24, 3, 2
ROWS = TOKENS * TOP_K


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lean_gate_is_the_gate_bit_by_bit(dtype):
    torch.manual_seed(0)
    gate_up = torch.randn(ROWS, 2 * INNER, requires_grad=True, dtype=dtype)
    upstream = torch.randn(ROWS, INNER, dtype=dtype)
    lean = grouped_mm._LeanSwiglu.apply(gate_up)
    plain = SWIGLU(*gate_up.chunk(2, dim=-1))
    assert torch.equal(lean, plain)
    seen, wanted = (torch.autograd.grad(result, gate_up, upstream)[0] for result in (lean, plain))
    assert torch.equal(seen, wanted)


def test_lean_gate_has_the_gradient_of_its_values():
    gate_up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(grouped_mm._LeanSwiglu.apply, gate_up)


def test_no_rows_never_reach_torchs_kernel(monkeypatch):
    """Whose pointers would be null; every tensor gets its gradient all the same: zeros."""

    def refuse(*_args, **_options):
        raise AssertionError("reached")

    monkeypatch.setattr(grouped_mm, "grouped_mm", refuse)
    case = LayerCase(0, HIDDEN, INNER, num_experts=EXPERTS, rank=4, has_bias=True)
    assert_equals_obvious(case, run_experts_grouped_mm, torch.bfloat16)


def saved_elements(gate, *, train, interleaved=False):
    """Return the elements of all floating point storages that a forward pass saves."""
    torch.manual_seed(0)
    gate_up, down = torch.randn(EXPERTS, 2 * INNER, HIDDEN), torch.randn(EXPERTS, HIDDEN, INNER)
    weights = [weight.requires_grad_(train) for weight in (gate_up, down)]
    tokens = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    top_k = torch.rand(TOKENS, TOP_K, requires_grad=True)
    order = sort_by_expert(torch.rand(TOKENS, EXPERTS).argsort(-1)[:, :TOP_K], EXPERTS)
    constants = {t.untyped_storage().data_ptr() for t in (*weights, tokens, top_k)}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in constants:
            sizes[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
        return tensor

    experts = ExpertWeights(*weights, gate, is_interleaved=interleaved)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run_experts_grouped_mm(tokens, order, top_k, experts)
    del output
    return sum(sizes.values())


def test_saves_rows_gate_and_up_the_products_and_the_results_and_nothing_else():
    results, wide, narrow = ROWS * HIDDEN, 2 * ROWS * INNER, ROWS * INNER
    assert saved_elements(SWIGLU, train=True) == 2 * results + wide + narrow
    # Frozen: neither the rows nor the products, which only the weights' gradients need.
    assert saved_elements(SWIGLU, train=False) == results + wide


@pytest.mark.parametrize(
    ("gate", "interleaved"),
    [
        (ActivationGate(torch.tanh), False),
        (KnownGate(clamp=Clamp.GPT_OSS, limit=7.0, alpha=1.7), False),
        (SWIGLU, True),
    ],
)
def test_other_gates_are_left_to_autograd(gate, interleaved):
    lean = saved_elements(SWIGLU, train=False)
    assert saved_elements(gate, train=False, interleaved=interleaved) > lean
