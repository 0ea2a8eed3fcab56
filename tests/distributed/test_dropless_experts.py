"""The sharded experts layer on real ranks against the reference on one, in values and gradients."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megablocks_utils.config.dispatch_cost import DispatchChoice
from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.backends.grouped_mm import run_experts_grouped_mm
from megablocks_utils.kernels.fused.fused_experts import run_experts_triton
from megablocks_utils.kernels.gate import SWIGLU
from megablocks_utils.kernels.weights import ExpertWeights
from megablocks_utils.mesh.device_mesh import build_mesh, compute_mesh_sizes
from megablocks_utils.mesh.placement import distribute_experts
from megablocks_utils.mesh.recomputation import recomputation_contexts
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.moe.expert_lora import ExpertLora
from megablocks_utils.moe.expert_spec import ExpertSpec
from megablocks_utils.moe.reference import experts_reference
from tests.support.communication import CommunicationCounter
from tests.support.compare import relative_error

NUM_EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 8, 16, 12, 2
BACKENDS = {
    "eager": run_experts_eager,
    "grouped_mm": run_experts_grouped_mm,
    "triton": run_experts_triton,
}
ROUTINGS = ("random", "empty_experts", "one_expert", "idle_rank")
# Sums of at most 16 products, in another order: a few units of the last place.
BOUNDS = {torch.float64: 1e-14, torch.float32: 2e-6}


def _tokens(rank, routing, dtype):
    """Return this rank's tokens: hidden states, top-k experts, weights, upstream gradient."""
    generator = torch.Generator().manual_seed(100 + rank)
    num_tokens = 0 if routing == "idle_rank" and rank == 1 else 5 + 3 * rank
    choices = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    if routing == "empty_experts":
        choices[:, [0, 3, 6, 7]] = 2.0  # never among the smallest
    if routing == "one_expert":
        choices[:, 5] = -1.0  # always first
    index = choices.argsort(-1)[:, : 1 if routing == "one_expert" else TOP_K]
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)
    weights = torch.rand(index.shape, generator=generator, dtype=torch.float64)
    upstream = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), index, weights.to(dtype), upstream.to(dtype)


def _weights(dtype):
    generator = torch.Generator().manual_seed(7)
    gate_up = torch.randn(
        NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator, dtype=torch.float64
    )
    down = torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE, generator=generator, dtype=torch.float64)
    return gate_up.to(dtype), down.to(dtype)


def _build_layer(ep_size, backend, dtype, dispatch):
    mesh = build_mesh(compute_mesh_sizes(dist.get_world_size(), ep_size, NUM_EXPERTS), "cpu")
    weights = [distribute_experts(w, mesh) for w in _weights(dtype)]
    spec = ExpertSpec(NUM_EXPERTS, HIDDEN, INTERMEDIATE)
    named = dict(zip(spec.projections, weights, strict=True))
    choice = DispatchChoice(dispatch, "")
    return DroplessExperts(spec, named, mesh=mesh, backend=BACKENDS[backend], dispatch=choice)


def _run_layer(rank, ep_size, backend, routing, dtype, dispatch):
    return _step(_build_layer(ep_size, backend, dtype, dispatch), rank, routing, dtype)


def _step(layer, rank, routing, dtype):
    """Return the output, and the gradients of inputs and (over all ranks) of what is trained."""
    hidden, index, top_k_weights, upstream = _tokens(rank, routing, dtype)
    hidden.requires_grad_()
    top_k_weights.requires_grad_()
    output = layer(hidden, index, top_k_weights)
    output.backward(upstream)
    trained_grads = []
    for parameter in layer.parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        grad = parameter.grad.full_tensor() / layer.mesh["ep"].size()
        dist.all_reduce(grad)  # every rank of the world adds its group's part ep_size times
        trained_grads.append(grad)
    return output.detach(), hidden.grad, top_k_weights.grad, *trained_grads


def _reference(world_size, routing):
    tokens = [_tokens(rank, routing, torch.float64) for rank in range(world_size)]
    hidden, index, top_k_weights, upstream = (
        torch.cat(parts) for parts in zip(*tokens, strict=True)
    )
    leaves = [hidden, top_k_weights, *_weights(torch.float64)]
    for leaf in leaves:
        leaf.requires_grad_()
    output = experts_reference(hidden, index, top_k_weights, ExpertWeights(*leaves[2:], SWIGLU))
    grads = torch.autograd.grad(output, leaves, upstream)
    return output.detach(), *grads


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("backend", "dtype", "dispatch"),
    [
        ("eager", torch.float64, "rows"),
        ("eager", torch.float64, "tokens"),
        ("eager", torch.float32, "rows"),
        ("grouped_mm", torch.float32, "rows"),
        ("grouped_mm", torch.float32, "tokens"),
    ],
)
def test_layer_equals_reference(ranks4, ep_size, backend, dtype, dispatch, routing):
    results = ranks4.run(_run_layer, ep_size, backend, routing, dtype, dispatch)
    by_token = [torch.cat([r[i] for r in results]) for i in range(3)]
    wanted = _reference(4, routing)
    for seen, expected in zip(by_token, wanted[:3], strict=True):
        assert relative_error(seen, expected) < BOUNDS[dtype]
    for i in (3, 4):
        assert relative_error(results[0][i], wanted[i]) < BOUNDS[dtype]
        assert all(torch.equal(r[i], results[0][i]) for r in results)


def test_tokens_once_per_rank_repeat_bit_for_bit(ranks4):
    arguments = 2, "grouped_mm", "random", torch.float32, "tokens"
    one, other = (ranks4.run(_run_layer, *arguments) for _ in range(2))
    for first, second in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


RANK, SCALING = 3, 0.5


def _adapters(dtype):
    """Return A and B of both projections, whole."""
    generator = torch.Generator().manual_seed(8)
    shapes = [(RANK, HIDDEN), (2 * INTERMEDIATE, RANK), (RANK, INTERMEDIATE), (HIDDEN, RANK)]
    return [
        torch.randn(NUM_EXPERTS, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    ]


def _run_layer_with_adapters(rank, ep_size, backend, routing, dtype, dispatch):
    layer = _build_layer(ep_size, backend, dtype, dispatch).requires_grad_(False)
    adapters = [distribute_experts(w, layer.mesh) for w in _adapters(dtype)]
    gate_up_a, gate_up_b, down_a, down_b = adapters
    layer.gate_up_proj_lora = ExpertLora(gate_up_a, gate_up_b, SCALING)
    layer.down_proj_lora = ExpertLora(down_a, down_b, SCALING)
    return _step(layer, rank, routing, dtype)


def _reference_with_adapters(world_size, routing):
    tokens = [_tokens(rank, routing, torch.float64) for rank in range(world_size)]
    hidden, index, top_k_weights, upstream = (
        torch.cat(parts) for parts in zip(*tokens, strict=True)
    )
    gate_up, down = _weights(torch.float64)
    leaves = [hidden, top_k_weights, *_adapters(torch.float64)]
    for leaf in leaves:
        leaf.requires_grad_()
    gate_up = gate_up + SCALING * leaves[3] @ leaves[2]
    down = down + SCALING * leaves[5] @ leaves[4]
    output = experts_reference(hidden, index, top_k_weights, ExpertWeights(gate_up, down, SWIGLU))
    return output.detach(), *torch.autograd.grad(output, leaves, upstream)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("ep_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("backend", "dtype", "dispatch"),
    [("eager", torch.float64, "tokens"), ("grouped_mm", torch.float32, "rows")],
)
def test_layer_with_adapters_equals_merged_reference(
    ranks4, ep_size, backend, dtype, dispatch, routing
):
    results = ranks4.run(_run_layer_with_adapters, ep_size, backend, routing, dtype, dispatch)
    wanted = _reference_with_adapters(4, routing)
    for i, expected in enumerate(wanted):
        by_rank = [result[i] for result in results]
        seen = torch.cat(by_rank) if i < 3 else by_rank[0]
        assert relative_error(seen, expected) < BOUNDS[dtype], i


# Triton's interpreter is slow: each ep size, and each routing, once.
@pytest.mark.parametrize(
    ("ep_size", "dispatch", "routing"),
    [(1, "rows", "empty_experts"), (2, "tokens", "random"), (4, "rows", "idle_rank")],
)
def test_fused_layer_equals_reference(ranks4, ep_size, dispatch, routing):
    test_layer_equals_reference(ranks4, ep_size, "triton", torch.float32, dispatch, routing)


@pytest.mark.parametrize(
    ("ep_size", "dispatch", "routing"), [(2, "rows", "one_expert"), (4, "tokens", "random")]
)
def test_fused_layer_with_adapters_equals_merged_reference(ranks4, ep_size, dispatch, routing):
    test_layer_with_adapters_equals_merged_reference(
        ranks4, ep_size, "triton", torch.float32, dispatch, routing
    )


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that do something while it is entered: views cost a GPU nothing."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """Counts the reads of values, which a GPU's host would wait for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        reads = ("tolist", "item", "nonzero", "__bool__", "__int__", "__index__", "numpy")
        self.count += getattr(func, "__name__", "") in reads
        return func(*args, **(kwargs or {}))


def _run_checkpointed(rank, ep_size, dispatch):
    """Return gradients of two steps whose forward passes come first, and what one step costs."""
    layer = _build_layer(ep_size, "grouped_mm", torch.float32, dispatch)
    grads, costs = {}, {}
    for mode in ("none", "full", "selective"):
        reads = HostReads()

        def run(*inputs, reads=reads):
            with reads:
                return layer(*inputs)

        contexts = partial(recomputation_contexts, keeps_rows=mode == "selective")
        if mode != "none":
            run = partial(checkpoint, run, use_reentrant=False, context_fn=contexts)
        for operators in (None, OperatorCounter()):
            layer.zero_grad()
            reads.count = 0
            routings = ("random", "idle_rank") if operators is None else ("random",)
            steps = [_tokens(rank, routing, torch.float32) for routing in routings]
            leaves = [leaf.requires_grad_() for h, _, w, _ in steps for leaf in (h, w)]
            with operators or CommunicationCounter() as counter:
                outputs = [run(*inputs) for *inputs, _ in steps]
                for output, (*_, upstream) in zip(outputs, steps, strict=True):
                    output.backward(upstream)
            if operators is None:
                grads[mode] = [p.grad for p in layer.parameters()] + [x.grad for x in leaves]
                calls = dict(counter.calls)
        costs[mode] = operators.count, reads.count, calls
    equal = [all(map(torch.equal, grads[mode], grads["none"])) for mode in ("full", "selective")]
    return equal, costs


# Operators that are no views, forward and backward; on a GPU each is a launch, or more.
BUDGETS = {
    (1, "rows"): {"none": 36, "full": 51, "selective": 51},
    (4, "rows"): {"none": 72, "full": 110, "selective": 104},
    (4, "tokens"): {"none": 122, "full": 203, "selective": 197},
}
ROW_EXCHANGES = {"none": 4, "full": 6, "selective": 4}


@pytest.mark.parametrize(("ep_size", "dispatch"), BUDGETS)
def test_a_checkpointed_layer_keeps_its_routing_and_its_budget(ranks4, ep_size, dispatch):
    """Bit for bit the gradients of a layer that is not; no second read, no second count."""
    for equal, costs in ranks4.run(_run_checkpointed, ep_size, dispatch):
        assert equal == [True, True]
        seen = {mode: operators for mode, (operators, *_) in costs.items()}
        budget = BUDGETS[ep_size, dispatch]
        assert all(seen[mode] <= budget[mode] for mode in seen), seen
        for mode, (_, host_reads, calls) in costs.items():
            assert host_reads == (ep_size > 1)
            wanted = {"all_to_all of counts": 2, "all_to_all of rows": 2 * ROW_EXCHANGES[mode]}
            if dispatch == "tokens":
                wanted["all_to_all of routing"] = 4  # and the weights' gradients
            assert calls == (wanted if ep_size > 1 else {})
