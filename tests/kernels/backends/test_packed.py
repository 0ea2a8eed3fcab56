"""Experts packed in few bits give what the weights they stand for give, and save no more."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.backends.grouped_mm import run_experts_grouped_mm
from megablocks_utils.kernels.backends.packed import run_packed
from megablocks_utils.kernels.gate import SWIGLU
from megablocks_utils.kernels.permute import sort_by_expert
from megablocks_utils.kernels.weights import ExpertWeights, LowRank
from megablocks_utils.quantization.dequantized_use import dequantize
from megablocks_utils.quantization.format_table import FORMATS
from megablocks_utils.quantization.packing import pack_all

EXPERTS, HIDDEN, INNER, TOKENS, RANK = 4, 64, 96, 24, 4
BACKENDS = {"eager": run_experts_eager, "grouped_mm": run_experts_grouped_mm}


def _build(name, is_transposed):
    """Return the same experts packed and dequantized, adapters that learn, and tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.1

    weights = [draw(EXPERTS, 2 * INNER, HIDDEN), draw(EXPERTS, HIDDEN, INNER)]
    if is_transposed:
        weights = [weight.mT.contiguous() for weight in weights]
    packed = [pack_all(name, weight, is_transposed=is_transposed) for weight in weights]
    plain = [weight.dequantize_some(0, EXPERTS) for weight in packed]
    sizes = ((HIDDEN, 2 * INNER), (INNER, HIDDEN))
    factors = [(draw(EXPERTS, RANK, n), draw(EXPERTS, m, RANK)) for n, m in sizes]
    loras = [LowRank(a.requires_grad_(), b.requires_grad_(), 2.0) for a, b in factors]
    experts = [
        ExpertWeights(*both, SWIGLU, *loras, is_transposed=is_transposed)
        for both in (packed, plain)
    ]
    return *experts, draw(TOKENS, HIDDEN).requires_grad_()


def _grads(run, tokens, experts, *, is_checkpointed=False):
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(3, (TOKENS, 2), generator=generator)  # the last expert has no token
    order = sort_by_expert(index, EXPERTS)
    weights = torch.rand(TOKENS, 2, generator=generator)
    run = partial(checkpoint, run, use_reentrant=False) if is_checkpointed else run
    output = run(tokens, order, weights, experts)
    leaves = [tokens, *(t for t in experts.tensors.values() if t.requires_grad)]
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_results_are_those_of_dequantized_weights(name, is_transposed, backend):
    packed, plain, tokens = _build(name, is_transposed)
    wanted = _grads(run_experts_eager, tokens, plain)
    run = partial(run_packed, BACKENDS[backend])
    for is_checkpointed in (False, True):
        seen = _grads(run, tokens, packed, is_checkpointed=is_checkpointed)
        for own, other in zip(seen, wanted, strict=True):
            assert (own - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dequantized_weight_is_saved(backend):
    """Everything that autograd would save goes through the hooks that stand around the layer."""
    packed, plain, tokens = _build("nf4", is_transposed=False)
    order = sort_by_expert(torch.zeros(TOKENS, 1, dtype=torch.int64), EXPERTS)

    def save(run, experts):
        sizes = []
        with saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
            run(tokens, order, None, experts)
        return sum(size[-2:] in {(INNER, HIDDEN), (HIDDEN, INNER)} for size in sizes) + sum(
            set(size[-2:]) == {2 * INNER, HIDDEN} for size in sizes
        )

    assert save(BACKENDS[backend], plain)
    assert not save(partial(run_packed, BACKENDS[backend]), packed)


def test_nothing_is_kept_from_one_step_to_the_next():
    """FSDP2 gathers into the same memory again; an optimizer changes adapters where they lie."""
    packed, _, tokens = _build("nf4", is_transposed=False)
    run = partial(run_packed, run_experts_eager)
    _grads(run, tokens, packed)
    projection = packed.gate_up_proj
    for number in range(EXPERTS):
        projection.pack_expert(number, torch.randn(2 * INNER, HIDDEN) * 0.1)
    packed.gate_up_lora.lora_b.data.mul_(2)
    plain = replace(
        packed, gate_up_proj=dequantize(projection), down_proj=dequantize(packed.down_proj)
    )
    wanted = _grads(run_experts_eager, tokens, plain)
    for own, other in zip(_grads(run, tokens, packed), wanted, strict=True):
        assert (own - other).norm() <= 1e-5 * other.norm()


def test_no_operator_makes_whole_weights_unasked():
    packed, _, _ = _build("mxfp4", is_transposed=False)
    with pytest.raises(NotImplementedError, match="dequantize them first"):
        packed.gate_up_proj + 1
