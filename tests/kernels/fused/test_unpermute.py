"""The fused weighted sum against torch's operators and plain indexing, in values and gradients."""

import pytest
import torch

from megablocks_utils.kernels.fused import unpermute
from megablocks_utils.kernels.fused.unpermute import fused_sum_rows, fused_unpermute_and_combine
from megablocks_utils.kernels.permute import ExpertOrder, sort_by_expert, unpermute_and_combine
from megablocks_utils.kernels.token_rows import sum_rows
from megablocks_utils.mesh.token_dispatch import TokenRows
from tests.support.compare import relative_error

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(
        unpermute, "find_combine_kernels", lambda _device, _dtype: unpermute._load_kernels()
    )


def step(combine, leaves, order, upstream, needed=(True, True)):
    flagged = zip(leaves, needed, strict=True)
    leaves = [leaf.detach().requires_grad_(is_needed) for leaf, is_needed in flagged]
    output = combine(*leaves, order)
    return output, *torch.autograd.grad(output, [x for x in leaves if x.requires_grad], upstream)


def plain(rows, weights, order):
    by_slot = rows[order.inverse].unflatten(0, weights.shape)
    return (by_slot * weights.unsqueeze(-1)).sum(1)


# One tile; two, the second masked; K not a power of two; weights of the rows' dtype; no token.
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_cols", "dtypes"),
    [
        (5, 2, 40, (torch.float32, torch.float32)),
        (3, 1, 2100, (torch.bfloat16, torch.float32)),
        (3, 5, 300, (torch.bfloat16, torch.float32)),
        (4, 2, 24, (torch.bfloat16, torch.bfloat16)),
        (0, 2, 24, (torch.bfloat16, torch.float32)),
    ],
)
def test_values_and_gradients(num_tokens, top_k, num_cols, dtypes):
    """As near to fp64 as torch's operators in the same dtypes; a gradient is rounded once."""
    torch.manual_seed(top_k)
    order = sort_by_expert(torch.rand(num_tokens, 6).argsort(-1)[:, :top_k], num_experts=6)
    rows = torch.randn(num_tokens * top_k, num_cols).to(dtypes[0])
    weights = torch.rand(num_tokens, top_k).to(dtypes[1])
    # Not contiguous, as the gradient of a sum or a transposition.
    upstream = torch.randn(num_cols, num_tokens).to(dtypes[0]).T
    seen = step(fused_unpermute_and_combine, (rows, weights), order, upstream)
    torchs = step(unpermute_and_combine, (rows, weights), order, upstream)
    exact = step(plain, (rows.double(), weights.double()), order, upstream.double())
    for ours, theirs, wanted in zip(seen, torchs, exact, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert relative_error(ours, wanted) <= 1.1 * relative_error(theirs, wanted) + 2e-7
    only_rows = step(fused_unpermute_and_combine, (rows, weights), order, upstream, (True, False))
    only_weights = step(
        fused_unpermute_and_combine, (rows, weights), order, upstream, (False, True)
    )
    assert torch.equal(only_rows[1], seen[1])
    assert torch.equal(only_weights[1], seen[2])


def plain_sum(values, weights, rows):
    sums = values.new_zeros(len(rows.starts), values.shape[1])
    return sums.index_add(0, rows.token, values * weights.unsqueeze(1))


# A token without rows, one with three; two tiles, the second masked; no row at all.
@pytest.mark.parametrize(
    ("token", "num_cols", "dtype"),
    [
        ((2, 0, 3, 2, 2), 40, torch.float32),
        ((1, 3, 0, 1), 1100, torch.bfloat16),
        ((), 24, torch.bfloat16),
    ],
)
def test_sums_of_any_number_of_rows(token, num_cols, dtype, monkeypatch):
    torch.manual_seed(1)
    token = torch.tensor(token, dtype=torch.int64)
    starts = torch.bincount(token, minlength=4).cumsum(0).roll(1)
    starts[0] = 0
    rows = TokenRows(token, token.argsort(stable=True), starts)
    values, weights = torch.randn(len(token), num_cols).to(dtype), torch.rand(len(token))
    upstream = torch.randn(num_cols, 4).to(dtype).T
    seen = step(fused_sum_rows, (values, weights), rows, upstream)
    torchs = step(sum_rows, (values, weights), rows, upstream)
    exact = step(plain_sum, (values.double(), weights.double()), rows, upstream.double())
    for ours, theirs, wanted in zip(seen, torchs, exact, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert relative_error(ours, wanted) <= 1.1 * relative_error(theirs, wanted) + 2e-7
    only_weights = step(fused_sum_rows, (values, weights), rows, upstream, (False, True))
    assert torch.equal(only_weights[1], seen[2])
    monkeypatch.setattr(unpermute, "find_combine_kernels", lambda *_: 1 / 0)
    assert torch.equal(fused_sum_rows(values, weights, rows), seen[0])  # nothing to go back


def test_rows_without_weights_and_of_fp64_take_torchs_way(monkeypatch):
    monkeypatch.undo()
    order = ExpertOrder(None, None, torch.tensor([3]), top_k=1)
    rows = torch.randn(3, 2)
    assert fused_unpermute_and_combine(rows, None, order) is rows
    assert unpermute.find_combine_kernels(rows.device, rows.dtype) is None
