"""Routed rows into expert order and back, against hand-written orders and plain indexing."""

import pytest
import torch

from megablocks_utils.kernels import permute
from megablocks_utils.kernels.permute import (
    ExpertOrder,
    permute_tokens,
    sort_by_expert,
    unpermute_and_combine,
)
from tests.support.compare import relative_error


def test_sort_by_expert_keeps_token_order_within_an_expert():
    """Written out by hand: token 0 -> experts 2, 0; token 1 -> 0, 2; token 2 -> 2, 3."""
    order = sort_by_expert(torch.tensor([[2, 0], [0, 2], [2, 3]]), num_experts=5)
    assert order.order.tolist() == [1, 2, 0, 3, 4, 5]
    assert order.inverse.tolist() == [2, 0, 1, 3, 4, 5]
    assert order.tokens_per_expert.tolist() == [2, 0, 3, 1, 0]
    assert order.top_k == 2


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("top_k", [1, 2, 4])  # 4 = all experts
def test_permute_and_combine_have_the_gradients_of_plain_indexing(num_tokens, top_k):
    torch.manual_seed(num_tokens + top_k)
    index = torch.rand(num_tokens, 4).argsort(-1)[:, :top_k]
    order = sort_by_expert(index, num_experts=4)
    hidden = torch.randn(num_tokens, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(num_tokens, top_k, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(num_tokens, 3, dtype=torch.float64)

    rows = permute_tokens(hidden, order)
    seen = unpermute_and_combine(rows * rows.detach().sin(), weights, order)
    seen_grads = torch.autograd.grad(seen, [hidden, weights], upstream)

    copies = hidden.unsqueeze(1).expand(-1, top_k, -1)
    wanted = (copies * copies.detach().sin() * weights.unsqueeze(-1)).sum(1)
    wanted_grads = torch.autograd.grad(wanted, [hidden, weights], upstream)
    assert relative_error(seen, wanted) < 1e-14
    for ours, reference in zip(seen_grads, wanted_grads, strict=True):
        assert relative_error(ours, reference) < 1e-14


def test_combine_sums_bf16_rows_in_fp32():
    """256 + 1 + 1 is 258 in fp32 and stays 256 when each sum is rounded to bf16."""
    order = sort_by_expert(torch.tensor([[0, 1, 2]]), num_experts=3)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert unpermute_and_combine(rows, torch.ones(1, 3), order).item() == 258.0


def test_combine_keeps_what_bf16_cannot_hold_of_fp32_weights():
    """Rounded to bf16, 1 + 2^-10 would be 1, and the rows would cancel out."""
    order = sort_by_expert(torch.tensor([[0, 1]]), num_experts=2)
    rows = torch.tensor([[4096.0], [-4096.0]], dtype=torch.bfloat16)
    assert unpermute_and_combine(rows, torch.tensor([[1 + 2**-10, 1.0]]), order).item() == 4.0


def test_gradient_of_bf16_rows_is_rounded_once():
    """200 (1 + 2^-8 + 2^-9) is 201 in bf16; with the weight rounded first it would be 202."""
    order = sort_by_expert(torch.tensor([[0]]), num_experts=1)
    rows = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    output = unpermute_and_combine(rows, torch.tensor([[1 + 2**-8 + 2**-9]]), order)
    upstream = torch.tensor([[200.0]], dtype=torch.bfloat16)
    assert torch.autograd.grad(output, rows, upstream)[0].item() == 201.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_weights_is_the_same_in_blocks_of_rows(monkeypatch, dtype):
    torch.manual_seed(0)
    order = sort_by_expert(torch.rand(7, 4).argsort(-1)[:, :2], num_experts=4)
    rows, upstream = torch.randn(14, 8).to(dtype), torch.randn(7, 8).to(dtype)
    weights = torch.rand(7, 2, requires_grad=True)

    def gradient():
        output = unpermute_and_combine(rows, weights, order)
        return torch.autograd.grad(output, weights, upstream)[0]

    whole = gradient()
    wanted = rows[order.inverse].unflatten(0, (7, 2)).double() @ upstream.double().unsqueeze(-1)
    assert relative_error(whole, wanted.squeeze(-1)) < 1e-6
    monkeypatch.setattr(permute, "_BLOCK_ELEMENTS_CPU", 5 * 8)  # 14 rows: 5, 5, 4
    assert torch.equal(gradient(), whole)


def test_rows_of_one_expert_each_are_only_reordered():
    index = torch.tensor([2, 0, 1])
    order = ExpertOrder(index, index.argsort(), torch.tensor([1, 1, 1]), top_k=1)
    rows = torch.arange(6.0).view(3, 2).requires_grad_()
    sorted_rows = permute_tokens(rows, order)
    assert torch.equal(sorted_rows, rows[index])
    (grad,) = torch.autograd.grad(
        sorted_rows, rows, torch.tensor([[1.0, 1], [2, 2], [3, 3]]), retain_graph=True
    )
    assert grad.tolist() == [[2, 2], [3, 3], [1, 1]]
    home = unpermute_and_combine(sorted_rows, None, order)
    assert torch.equal(home, rows)
    upstream = torch.randn(3, 2)
    assert torch.equal(torch.autograd.grad(home, rows, upstream)[0], upstream)


def test_rows_that_are_sorted_are_not_copied():
    order = ExpertOrder(None, None, torch.tensor([3]), top_k=1)
    rows = torch.randn(3, 2)
    assert permute_tokens(rows, order) is rows
    assert unpermute_and_combine(rows, None, order) is rows
