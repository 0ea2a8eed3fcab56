"""Routed rows into expert order and back, against hand-written orders and plain indexing."""

import pytest
import torch

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
