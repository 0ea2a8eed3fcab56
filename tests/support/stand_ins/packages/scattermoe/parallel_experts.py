import torch


def parallel_linear(
    inputs,
    expert_weights,
    k,
    sorted_expert_idxs,
    sorted_scattered_idxs,
    expert_offsets,
    expert_biases=None,
    gates=None,
    grouped_in=False,
    grouped_out=False,
):
    return _ParallelLinear.apply(
        inputs,
        expert_weights,
        expert_biases,
        gates,
        (k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets, grouped_in, grouped_out),
    )


class _ParallelLinear(torch.autograd.Function):
    """Like the real one, it computes every gradient whoever wants it."""

    @staticmethod
    def forward(ctx, inputs, weights, biases, gates, places):
        ctx.save_for_backward(inputs, weights, biases, gates)
        ctx.places = places
        return _compute(inputs, weights, biases, gates, *places)

    @staticmethod
    def backward(ctx, grad):
        leaves = [x if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            output = _compute(*leaves, *ctx.places)
        wanted = [leaf for leaf in leaves if leaf is not None]
        grads = iter(torch.autograd.grad(output, wanted, grad))
        return *(None if leaf is None else next(grads) for leaf in leaves), None


def _compute(
    inputs, weights, biases, gates, k, sorted_experts, scattered, offsets, grouped_in, grouped_out
):
    num_rows, num_experts = len(sorted_experts), len(weights)
    assert num_rows == len(scattered) == len(inputs) * k
    assert inputs.dtype == weights.dtype
    assert sorted(scattered.tolist()) == list(range(num_rows))
    assert sorted_experts.tolist() == sorted(sorted_experts.tolist())
    counts = sorted_experts.bincount(minlength=num_experts)
    assert offsets.tolist() == counts.cumsum(0).tolist()

    rows = inputs if grouped_in else inputs[scattered // k]
    results = []
    for expert, expert_rows in enumerate(rows.split(counts.tolist())):
        result = expert_rows @ weights[expert]
        results.append(result if biases is None else result + biases[expert])
    output = torch.cat(results)
    if not grouped_out:
        output = torch.zeros_like(output).index_copy(0, scattered, output)
    if gates is None:
        return output
    assert gates.dtype == output.dtype
    return (gates.unsqueeze(1) @ output.unflatten(0, gates.shape)).squeeze(1)
