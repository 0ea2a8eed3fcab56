"""The equations of the fused backward pass, written out in fp64, against autograd."""

import pytest
import torch

from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.gate import SWIGLU, Clamp, KnownGate
from tests.support.layer_case import SCALING, LayerCase, prepare

CASE = LayerCase(6, 5, 4, num_experts=3, rank=2, has_bias=True)


def differentiate_by_hand(case: LayerCase) -> dict[str, torch.Tensor]:
    """Return every gradient of a layer from x, h, p and the output's gradient alone."""
    run = prepare(case, torch.float64)
    leaf = {name: tensor.detach() for name, tensor in run.leaves.items()}
    experts = case.draw_index().reshape(-1)
    token = torch.arange(case.num_tokens).repeat_interleave(case.top_k)
    w1, w2 = leaf["gate_up_proj"][experts], leaf["down_proj"][experts]
    a1, b1 = leaf["gate_up_proj.lora_A"][experts], leaf["gate_up_proj.lora_B"][experts]
    a2, b2 = leaf["down_proj.lora_A"][experts], leaf["down_proj.lora_B"][experts]
    x, grad = leaf["tokens"][token], run.upstream[token]
    p = leaf["top_k_weights"].reshape(-1, 1)

    def times(rows, matrices):  # (N, in) by (N, out, in)
        return torch.einsum("ni,noi->no", rows, matrices)

    z1 = SCALING * times(x, a1)
    h = times(x, w1) + times(z1, b1) + leaf["gate_up_proj_bias"][experts]
    gate, up = h.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    a = gate * sigmoid * up

    u2 = SCALING * times(grad, b2.mT)
    da = times(grad, w2.mT) + times(u2, a2.mT)  # of the unweighted result
    dp = (da * a).sum(1) + (grad * leaf["down_proj_bias"][experts]).sum(1)
    da, weighted = p * da, p * a
    by_gate = up * sigmoid * (1 + gate * (1 - sigmoid))
    dh = torch.cat([da * by_gate, da * gate * sigmoid], dim=-1)
    v1 = SCALING * times(dh, b1.mT)
    dx = times(dh, w1.mT) + times(v1, a1.mT)

    def outer(left, right):
        products = torch.einsum("no,ni->noi", left, right)
        shape = case.num_experts, *products.shape[1:]
        return torch.zeros(shape, dtype=torch.float64).index_add(0, experts, products)

    ones = torch.ones_like(p)
    return {
        "tokens": torch.zeros_like(leaf["tokens"]).index_add(0, token, dx),
        "top_k_weights": dp.view_as(leaf["top_k_weights"]),
        "gate_up_proj": outer(dh, x),
        "gate_up_proj_bias": outer(dh, ones).squeeze(2),
        "gate_up_proj.lora_A": outer(v1, x),
        "gate_up_proj.lora_B": outer(dh, z1),
        "down_proj": outer(grad, weighted),
        "down_proj_bias": outer(grad, p).squeeze(2),
        "down_proj.lora_A": outer(u2, weighted),
        "down_proj.lora_B": outer(grad, SCALING * times(weighted, a2)),
    }


def test_equations_are_autograds():
    wanted = prepare(CASE, torch.float64).results(run_experts_eager)
    seen = differentiate_by_hand(CASE)
    assert seen.keys() == wanted.keys() - {"output"}
    for name, gradient in seen.items():
        assert (gradient - wanted[name]).norm() < 1e-13 * wanted[name].norm(), name


@pytest.mark.parametrize(
    "gate",
    [SWIGLU, KnownGate(clamp=Clamp.GPT_OSS, limit=0.7, alpha=1.702)],
    ids=["silu", "clamped"],
)
def test_the_reference_has_the_gradients_of_differences(gate):
    case = LayerCase(3, 3, 2, num_experts=3, rank=1, has_bias=True, gate=gate)
    run = prepare(case, torch.float64)

    def forward(*leaves):
        experts = case.build_experts(dict(zip(run.leaves, leaves, strict=True)))
        return run_experts_eager(leaves[0], run.order, leaves[1], experts)

    assert torch.autograd.gradcheck(forward, tuple(run.leaves.values()))
