"""The fused layer against the obvious one, in values and every gradient; what it keeps and skips.

Tiles have 16 rows, 32 (thin ones 16) columns and 16 (32) steps of a sum, so sizes of 40 and more
cross tiles in every dim and end inside one.
"""

import inspect
import math
import pkgutil
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch

from megablocks_utils.kernels import fused
from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.fused import fused_experts
from megablocks_utils.kernels.gate import Activation, Clamp, KnownActivation, KnownGate
from tests.support.allocations import LargestResult
from tests.support.compare import relative_error
from tests.support.layer_case import (
    ADAPTERS,
    PROJECTIONS,
    SMALL_TILES,
    LayerCase,
    LayerRun,
    assert_equals_obvious,
    prepare,
    run_case,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
run_experts_triton = partial(fused_experts.run_experts_triton, tiles=SMALL_TILES)
FP32, BF16 = torch.float32, torch.bfloat16
SILU, GELU, RELU_SQUARED = Activation
GPT_OSS = KnownGate(clamp=Clamp.GPT_OSS, limit=0.7, alpha=1.702)


def _gate(activation: Activation, clamp: Clamp) -> KnownGate:
    return KnownGate(activation, clamp, math.inf if clamp is Clamp.NONE else 0.7)


WIDE = LayerCase(18, 40, 36)  # tiles are crossed in rows, columns and sums
PLAIN = LayerCase(5, 24, 36)
SMALL = LayerCase(5, 16, 20)  # within one tile: for what the place of a tile cannot change
LORA = replace(SMALL, rank=4)
CASES = {
    "tiles are crossed": (replace(WIDE, rank=4), FP32),
    "tiles are crossed, bf16": (WIDE, BF16),
    "one token": (replace(SMALL, num_tokens=1), FP32),
    "no token": (replace(LORA, num_tokens=0), FP32),
    "every expert": (replace(SMALL, top_k=3), FP32),
    "one hot expert": (LayerCase(40, 24, 20, num_experts=5, top_k=1, routing="one expert"), FP32),
    "more row tiles than a group": (LayerCase(140, 16, 8, num_experts=2, top_k=1), FP32),
    "an expert twice in a token": (replace(SMALL, routing="same twice"), FP32),
    "one expert": (replace(SMALL, num_experts=1, top_k=1), FP32),
    "received rows": (
        replace(LORA, num_tokens=18, top_k=1, is_received=True, has_bias=True),
        FP32,
    ),
    "adapters, bf16": (replace(PLAIN, rank=16), BF16),
    "rank 1": (replace(SMALL, rank=1), FP32),
    "rank beyond a block of 64": (replace(SMALL, num_experts=1, top_k=1, rank=72), FP32),
    "frozen experts": (replace(SMALL, frozen=PROJECTIONS), FP32),
    "frozen first projection": (replace(LORA, frozen=("gate_up_proj", *ADAPTERS[:2])), FP32),
    "frozen second projection": (replace(LORA, frozen=("down_proj", *ADAPTERS[2:])), FP32),
    "only parameters": (replace(LORA, frozen=("tokens", "top_k_weights")), FP32),
    "only A": (replace(LORA, frozen=(*PROJECTIONS, "tokens", ADAPTERS[1], ADAPTERS[3])), FP32),
    "only B": (replace(LORA, frozen=(*PROJECTIONS, "tokens", ADAPTERS[0], ADAPTERS[2])), FP32),
    "bias": (replace(SMALL, has_bias=True), FP32),
    "interleaved": (replace(PLAIN, rank=4, is_interleaved=True), FP32),
    "transposed": (replace(PLAIN, is_transposed=True), FP32),
    "clamped": (replace(SMALL, gate=GPT_OSS), FP32),
    "as GPT-OSS": (
        replace(
            PLAIN, rank=4, has_bias=True, is_interleaved=True, is_transposed=True, gate=GPT_OSS
        ),
        BF16,
    ),
    **{
        f"{activation}, clamp {clamp}": (
            replace(SMALL, is_interleaved=activation is GELU, gate=_gate(activation, clamp)),
            FP32,
        )
        for activation in Activation
        for clamp in (Clamp.NONE, Clamp.BEFORE, Clamp.AFTER)
    },
    # The other activations without a gate are those of the cases below.
    "silu without a gate": (replace(SMALL, gate=KnownActivation(SILU)), FP32),
    "without a gate, tiles are crossed": (
        replace(WIDE, rank=4, has_bias=True, gate=KnownActivation(RELU_SQUARED)),
        FP32,
    ),
    "without a gate, received rows": (
        replace(
            LORA,
            num_tokens=18,
            top_k=1,
            is_received=True,
            is_transposed=True,
            gate=KnownActivation(GELU),
        ),
        BF16,
    ),
    "without a gate, no token": (
        replace(LORA, num_tokens=0, gate=KnownActivation(RELU_SQUARED)),
        FP32,
    ),
    "without a gate, frozen": (
        replace(LORA, frozen=PROJECTIONS, gate=KnownActivation(RELU_SQUARED)),
        FP32,
    ),
}


@pytest.mark.parametrize(("case", "dtype"), CASES.values(), ids=CASES)
def test_layer_equals_the_obvious_one(case, dtype):
    assert_equals_obvious(case, run_experts_triton, dtype)


def test_a_limit_cuts_gates_and_ups_on_both_sides():
    """Otherwise the clamped cases would prove nothing."""
    case = CASES["clamped"][0]
    leaves = case.draw_leaves()
    gate_up_out = torch.einsum("th,eoh->teo", leaves["tokens"], leaves["gate_up_proj"])
    gate, up = gate_up_out.chunk(2, dim=-1)
    shares = [(gate > 0.7).double().mean(), (up > 0.7).double().mean(), (up < -0.7).double().mean()]
    assert all(0.1 < share < 0.5 for share in shares)


@pytest.mark.parametrize(
    "gate",
    [GPT_OSS, _gate(SILU, Clamp.AFTER), KnownActivation(RELU_SQUARED)],
    ids=["clamp before", "clamp after", "no gate"],
)
def test_what_is_not_a_number_stays_that(gate):
    """A limit or relu must not make a number of it: the run would go on with wrong weights."""
    run = prepare(replace(PLAIN, gate=gate), FP32)
    with torch.no_grad():
        run.leaves["tokens"][0] = math.nan
        output = run.forward(run_experts_triton)
    assert output[0].isnan().all() and output[1:].isfinite().all()


def _keep(case: LayerCase) -> tuple[LayerRun, list[torch.Tensor]]:
    """Return a run and everything that autograd keeps of its forward pass."""
    kept = []
    run = prepare(case, FP32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run.forward(run_experts_triton)
    return run, kept


@pytest.mark.parametrize("case", [PLAIN, replace(LORA, frozen=PROJECTIONS)], ids=["full", "lora"])
def test_autograd_keeps_tokens_and_gate_inputs_and_nothing_else(case):
    """T * H + 2 * N * I elements and the routing: N indices and L + 1 offsets."""
    run, kept = _keep(case)
    own = {leaf.data_ptr() for leaf in run.leaves.values()}
    assert run.leaves["tokens"].data_ptr() in {tensor.data_ptr() for tensor in kept}
    num_rows = case.num_tokens * case.top_k
    seen = sorted((tensor.numel(), tensor.dtype) for tensor in kept if tensor.data_ptr() not in own)
    assert seen == [
        (case.num_experts + 1, torch.int32),
        (num_rows, torch.int64),
        (num_rows * 2 * case.intermediate_size, FP32),
    ]


def test_frozen_experts_without_adapters_do_not_keep_the_tokens():
    run, kept = _keep(replace(PLAIN, frozen=PROJECTIONS))
    assert run.leaves["tokens"].data_ptr() not in {tensor.data_ptr() for tensor in kept}


def test_gate_inputs_are_not_written_without_gradients():
    run = prepare(PLAIN, FP32)
    wanted = run.forward(run_experts_triton)
    with torch.no_grad(), LargestResult() as made:
        seen = run.forward(run_experts_triton)
    assert torch.equal(seen, wanted)
    assert made.num_elements == PLAIN.num_tokens * PLAIN.top_k * PLAIN.intermediate_size


def test_a_second_backward_pass_raises():
    run = prepare(PLAIN, FP32)
    output = run.forward(run_experts_triton).sum()
    output.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.backward()
    output = run.forward(run_experts_triton)
    upstream = run.upstream.requires_grad_()
    (grad,) = torch.autograd.grad(output, run.leaves["tokens"], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_expanded_gradients():
    """`sum().backward()` hands over one number with strides of zero."""
    run = prepare(PLAIN, FP32)
    leaves = list(run.leaves.values())
    wanted = torch.autograd.grad(run.forward(run_experts_eager).sum(), leaves)
    seen = torch.autograd.grad(run.forward(run_experts_triton).sum(), leaves)
    for ours, reference in zip(seen, wanted, strict=True):
        assert relative_error(ours, reference) <= 1e-6  # a few units of the last place


def test_frozen_experts_never_make_a_tensor_of_the_weights_size():
    """Few rows, wide experts: the largest result is then a gradient of an adapter."""
    case = LayerCase(2, 64, 64, num_experts=2, top_k=1, rank=2, frozen=PROJECTIONS)
    frozen, trained = prepare(case, FP32), prepare(replace(case, frozen=()), FP32)
    with LargestResult() as made:
        frozen.results(run_experts_triton)
    assert made.num_elements < frozen.leaves["down_proj"][0].numel()
    with LargestResult() as made:
        trained.results(run_experts_triton)
    assert made.num_elements >= trained.leaves["gate_up_proj"].numel()


def test_every_element_is_written_and_nothing_saved_is_written_to(monkeypatch):
    """Buffers begin as NaN, which would show up in a result; a kept graph gives the same again."""
    new_empty = torch.Tensor.new_empty

    def poisoned(tensor, *shape, **kwargs):
        made = new_empty(tensor, *shape, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    wanted = run_case(LORA, run_experts_triton, FP32)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    run = prepare(LORA, FP32)
    output = run.forward(run_experts_triton)
    assert torch.equal(output, wanted["output"])
    for _ in range(2):
        grads = torch.autograd.grad(
            output, list(run.leaves.values()), run.upstream, retain_graph=True
        )
        for name, grad in zip(run.leaves, grads, strict=True):
            assert torch.equal(grad, wanted[name]), name


def test_no_kernel_uses_atomics():
    for info in pkgutil.iter_modules(fused.__path__):
        module = import_module(f"{fused.__name__}.{info.name}")
        assert "tl.atomic" not in inspect.getsource(module)


def test_the_interpreters_own_tiles():
    """What runs where no tiles are named, as in the tests of whole training runs."""
    assert_equals_obvious(replace(WIDE, rank=4), fused_experts.run_experts_triton, FP32)
