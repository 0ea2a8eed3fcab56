"""For the real grouped_gemm on a CPU: what its compiled `gmm` does, in any dtype."""


def gmm(a, b, c, batch_sizes, trans_a, trans_b):
    assert not (trans_a and trans_b)
    sizes = batch_sizes.tolist()
    if trans_a:
        for result, left, right in zip(c, a.split(sizes), b.split(sizes), strict=True):
            result.copy_(left.T @ right)
        return
    for result, rows, weight in zip(c.split(sizes), a.split(sizes), b, strict=True):
        result.copy_(rows @ (weight.T if trans_b else weight))
