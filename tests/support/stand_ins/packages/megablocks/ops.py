import torch


def gather(x, indices, bin_ids, bins, top_k):
    _check(x, indices, bin_ids, bins)
    assert len(indices) == len(x) * top_k
    return x[indices // top_k]


def scatter(x, indices, bin_ids, weights, bins, top_k):
    _check(x, indices, bin_ids, bins)
    assert len(indices) == len(x)
    if weights is not None:
        assert weights.shape == indices.shape
        assert weights.is_contiguous()
        x = (x.float() * weights[indices].float().unsqueeze(1)).to(x.dtype)
    rows = torch.zeros_like(x).index_copy(0, indices.long(), x)
    return rows.unflatten(0, (-1, top_k)).sum(dim=1) if top_k > 1 else rows.view(rows.shape)


def _check(x, indices, bin_ids, bins):
    """The kernels know no strides and do not compile with other integers."""
    assert x.is_contiguous()
    for integers in (indices, bin_ids, bins):
        assert integers.dtype == torch.int32
        assert integers.is_contiguous()
    assert bin_ids.tolist() == sorted(bin_ids.tolist())
    assert bins.tolist() == bin_ids.bincount(minlength=len(bins)).cumsum(0).tolist()
