"""The start-up probe lets right backends pass on any weights, and names what a wrong one got wrong.

The planted bugs are backends that do what `eager` does but for one thing.
"""

import math
import random
from dataclasses import replace

import numpy
import pytest
import torch

from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.kernels.backends.eager import run_experts_eager
from megablocks_utils.kernels.backends.grouped_mm import run_experts_grouped_mm
from megablocks_utils.kernels.gate import (
    SWIGLU,
    Activation,
    ActivationGate,
    Clamp,
    KnownActivation,
    KnownGate,
)
from megablocks_utils.kernels.probing.probe import find_unprobed_reason, probe_backend
from megablocks_utils.kernels.weights import ExpertWeights, LowRank
from tests.support.reads import LiveBytes

FP32, BF16 = torch.float32, torch.bfloat16
RELU_SQUARED = Activation.RELU_SQUARED
# Ten times what these experts' gates are for tokens of a normal size.
FAR = KnownGate(clamp=Clamp.BEFORE, limit=10.0)


def draw_experts(variant, dtype=FP32, num_experts=4, hidden_size=64, intermediate_size=96, seed=1):
    """Return experts as a run has them: of a variant, B zero where there are adapters."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale, trains=variant != "frozen" and "lora" not in variant):
        tensor = torch.randn(shape, generator=generator) * scale
        return tensor.to(dtype).requires_grad_(trains)

    def adapter(num_out, num_in):
        lora_a = draw(num_experts, 4, num_in, scale=num_in**-0.5, trains=True)
        lora_b = torch.zeros(num_experts, num_out, 4, dtype=dtype, requires_grad=True)
        return LowRank(lora_a, lora_b, scaling=0.5)

    gate_up = draw(num_experts, 2 * intermediate_size, hidden_size, scale=hidden_size**-0.5)
    down = draw(num_experts, hidden_size, intermediate_size, scale=intermediate_size**-0.5)
    experts = ExpertWeights(gate_up, down, SWIGLU)
    if "lora" in variant:
        experts = replace(
            experts,
            gate_up_lora=adapter(2 * intermediate_size, hidden_size),
            down_lora=adapter(hidden_size, intermediate_size),
        )
    if variant == "clamped far out":
        experts = replace(experts, gate=FAR)
    if variant == "no gate":
        up = gate_up.detach()[:, :intermediate_size].clone().requires_grad_()
        experts = ExpertWeights(up, down, KnownActivation(RELU_SQUARED), has_gate=False)
    if variant == "like gpt-oss":
        experts = ExpertWeights(
            gate_up.detach().transpose(1, 2).contiguous().requires_grad_(),
            down.detach().transpose(1, 2).contiguous().requires_grad_(),
            KnownGate(clamp=Clamp.GPT_OSS, limit=2.0, alpha=1.702),
            gate_up_bias=draw(num_experts, 2 * intermediate_size, scale=0.3),
            down_bias=draw(num_experts, hidden_size, scale=0.3),
            is_transposed=True,
            is_interleaved=True,
        )
    return experts


VARIANTS = ("full", "frozen", "lora", "like gpt-oss", "clamped far out", "no gate")


@pytest.mark.parametrize("is_weighted", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_right_backend_passes(variant, dtype, is_weighted):
    for num_experts in (4, 1):
        experts = draw_experts(variant, dtype, num_experts)
        found = probe_backend(
            "grouped_mm", run_experts_grouped_mm, experts, dtype, is_weighted=is_weighted
        )
        assert 0 < found.ratio < 1.5
        # Values that bf16 moves across a limit are much in a gradient of few.
        assert found.error < (1e-6 if dtype == FP32 else 0.2 if "gpt" in variant else 2e-2)


@pytest.mark.parametrize("limit", [0.5, 7.0])
def test_a_right_backend_passes_by_a_wide_margin(limit):
    """What varies most: biases added after a rounding of their own, and values at the limit."""
    for seed in range(16):
        experts = draw_experts("like gpt-oss", BF16, num_experts=2, seed=seed)
        experts = replace(experts, gate=KnownGate(clamp=Clamp.GPT_OSS, limit=limit, alpha=1.702))
        found = probe_backend(
            "grouped_mm", run_experts_grouped_mm, experts, BF16, is_weighted=bool(seed % 2)
        )
        assert found.ratio < 1.5


def test_experts_are_probed_in_the_dtype_of_compute():
    """Weights in fp32, or frozen in bf16 with adapters in fp32, as `--precision mixed` has them."""
    mixed = replace(draw_experts("lora", BF16), down_lora=draw_experts("lora", FP32).down_lora)
    for experts in (draw_experts("full", FP32), mixed):
        found = probe_backend("grouped_mm", run_experts_grouped_mm, experts, BF16, is_weighted=True)
        assert 1e-3 < found.error < 1e-2


def test_every_gradient_that_is_wanted_is_compared():
    seen = []

    def watch(tokens, order, top_k_weights, experts):
        for name, tensor in {"p": top_k_weights, "x": tokens, **experts.tensors}.items():
            if tensor is not None and tensor.requires_grad:
                assert tensor.is_leaf
                tensor.register_hook(lambda grad, name=name: seen.append(name))
        seen.append(order.tokens_per_expert.tolist())
        return run_experts_eager(tokens, order, top_k_weights, experts)

    wanted = {"full": {"gate_up_proj", "down_proj"}, "frozen": set(), "lora": set()}
    wanted["lora"] = {f"{p}_proj.lora_{f}" for p in ("gate_up", "down") for f in "AB"}
    for variant, names in wanted.items():
        for is_weighted, counts in ((True, [[27, 37], [0, 64]]), (False, [[13, 19], [0, 32]])):
            seen.clear()
            experts = draw_experts(variant)
            probe_backend("a", watch, experts, FP32, is_weighted=is_weighted)
            assert [x for x in seen if isinstance(x, list)] == counts
            assert {x for x in seen if isinstance(x, str)} == names | {"x", *"p" * is_weighted}


class ScaleGradient(torch.autograd.Function):
    """Change nothing but the gradient."""

    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def scale_gradient(experts, name, factor):
    """Return experts in which the gradient of one tensor will be wrong."""
    target = experts.tensors[name]
    return experts.map_tensors(
        lambda tensor: ScaleGradient.apply(tensor, factor) if tensor is target else tensor
    )


def swap_gate_and_up(tokens, order, weights, experts):
    gate = experts.gate
    experts = replace(experts, gate=lambda gate_values, up: gate(up, gate_values))
    return run_experts_eager(tokens, order, weights, experts)


def compute_plain_swiglu(tokens, order, weights, experts):
    return run_experts_eager(tokens, order, weights, replace(experts, gate=SWIGLU))


def square_no_relu(tokens, order, weights, experts):
    return run_experts_eager(tokens, order, weights, replace(experts, gate=torch.square))


def drop_routing_weights(tokens, order, weights, experts):
    return run_experts_eager(tokens, order, torch.ones_like(weights), experts)


def scale_weight_gradient(tokens, order, weights, experts):
    experts = scale_gradient(experts, "down_proj", 1.05)
    return run_experts_eager(tokens, order, weights, experts)


def zero_lora_a_gradient(tokens, order, weights, experts):
    experts = scale_gradient(experts, "gate_up_proj.lora_A", 0.0)
    return run_experts_eager(tokens, order, weights, experts)


def drop_lora_b_gradient(tokens, order, weights, experts):
    lora = replace(experts.down_lora, lora_b=experts.down_lora.lora_b.detach())
    return run_experts_eager(tokens, order, weights, replace(experts, down_lora=lora))


def drop_bias_gradient(tokens, order, weights, experts):
    experts = replace(experts, down_bias=experts.down_bias.detach())
    return run_experts_eager(tokens, order, weights, experts)


def forget_lora_scaling(tokens, order, weights, experts):
    lora = replace(experts.gate_up_lora, scaling=1.0)
    return run_experts_eager(tokens, order, weights, replace(experts, gate_up_lora=lora))


def transpose_experts(tokens, order, weights, experts):
    experts = experts.map_tensors(lambda tensor: tensor.flip(0))
    return run_experts_eager(tokens, order, weights, experts)


def return_nan(tokens, order, weights, experts):
    return run_experts_eager(tokens, order, weights, experts) * math.nan


def nan_in_one_gradient(tokens, order, weights, experts):
    experts = scale_gradient(experts, "gate_up_proj", math.nan)
    return run_experts_eager(tokens, order, weights, experts)


def leave_out_a_last_odd_row(tokens, order, weights, experts):
    """As a mask that ends at a multiple of 2."""
    last = int(order.tokens_per_expert.cumsum(0)[0]) - 1
    keep = torch.ones(len(tokens) * order.top_k, 1, dtype=tokens.dtype)
    if order.tokens_per_expert[0] % 2:
        keep[order.order[last]] = 0
    weights = weights * keep.view_as(weights)
    return run_experts_eager(tokens, order, weights, experts)


class GarbageForEmpty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, counts):
        ctx.is_empty = counts == 0
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.where(ctx.is_empty.view(-1, 1, 1), 0.1, grad), None


def leave_garbage_for_an_empty_expert(tokens, order, weights, experts):
    gate_up = GarbageForEmpty.apply(experts.gate_up_proj, order.tokens_per_expert)
    return run_experts_eager(tokens, order, weights, replace(experts, gate_up_proj=gate_up))


def multiply_in_ten_bits(tokens, order, weights, experts):
    """As TF32 does where fp32 is asked for."""
    bits = (experts.gate_up_proj.view(torch.int32) & ~0x1FFF).view(FP32)
    gate_up = experts.gate_up_proj + (bits - experts.gate_up_proj).detach()
    return run_experts_eager(tokens, order, weights, replace(experts, gate_up_proj=gate_up))


BUGS = [
    (swap_gate_and_up, "full", "gradient of"),
    (compute_plain_swiglu, "like gpt-oss", "gradient of"),
    (compute_plain_swiglu, "clamped far out", "gradient of"),
    (square_no_relu, "no gate", "gradient of"),
    (drop_routing_weights, "full", "gradient of top_k_weights"),
    (scale_weight_gradient, "full", "gradient of down_proj"),
    (zero_lora_a_gradient, "lora", "gradient of gate_up_proj.lora_A"),
    (drop_lora_b_gradient, "lora", "gradient of down_proj.lora_B"),
    (drop_bias_gradient, "like gpt-oss", "gradient of down_proj_bias"),
    (forget_lora_scaling, "lora", "gradient of gate_up_proj.lora_"),
    (transpose_experts, "full", "gradient of"),
    (transpose_experts, "frozen", ""),
    (return_nan, "full", "output"),
    (nan_in_one_gradient, "full", "gradient of gate_up_proj"),
    (leave_out_a_last_odd_row, "frozen", ""),
    (leave_garbage_for_an_empty_expert, "full", "gradient of gate_up_proj"),
]


@pytest.mark.parametrize(("bug", "variant", "tensor"), BUGS)
def test_planted_bug_is_named(bug, variant, tensor):
    check_that_it_is_named(bug, variant, tensor, FP32)


@pytest.mark.parametrize(("bug", "variant", "tensor"), BUGS[:: len(BUGS) // 4])
def test_planted_bug_is_named_in_bf16(bug, variant, tensor):
    check_that_it_is_named(bug, variant, tensor, BF16)


def check_that_it_is_named(bug, variant, tensor, dtype):
    with pytest.raises(ConfigurationError) as refusal:
        probe_backend("triton", bug, draw_experts(variant, dtype), dtype, is_weighted=True)
    sentence = str(refusal.value)
    assert sentence.startswith(
        f"kernel triton fails its check on this model's weights: its {tensor}"
    )
    assert sentence.endswith("nothing was trained, use kernel eager or kernel grouped_mm.")
    assert ("is not finite" in sentence) == ("nan" in bug.__name__)


def test_fp32_must_be_fp32():
    with pytest.raises(ConfigurationError, match="explains"):
        probe_backend("triton", multiply_in_ten_bits, draw_experts("full"), FP32, is_weighted=True)


def test_the_sentence_has_both_figures():
    with pytest.raises(ConfigurationError) as refusal:
        probe_backend(
            "grouped_mm", scale_weight_gradient, draw_experts("full"), FP32, is_weighted=True
        )
    assert str(refusal.value) == (
        "kernel grouped_mm fails its check on this model's weights: its gradient of down_proj is "
        "off by 5.0e-02, more than 2 times the 4.1e-07 that rounding to float32 explains; nothing "
        "was trained, use kernel eager."
    )


def random_states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_nothing_of_the_user_changes():
    experts = draw_experts("lora")
    before = {name: tensor.clone() for name, tensor in experts.tensors.items()}
    states = random_states()
    with torch.no_grad():
        first = probe_backend("grouped_mm", run_experts_grouped_mm, experts, FP32, is_weighted=True)
    assert random_states() == states
    for name, tensor in experts.tensors.items():
        assert torch.equal(tensor, before[name]) and tensor.grad is None
        assert tensor.requires_grad == ("lora" in name)
    again = probe_backend("grouped_mm", run_experts_grouped_mm, experts, FP32, is_weighted=True)
    assert again == first


@pytest.mark.parametrize(("variant", "copies"), [("full", 3.0), ("frozen", 1.5), ("lora", 1.5)])
def test_memory_is_bounded_by_two_experts(variant, copies):
    """In bf16: precise weights, and if wanted their gradients, twice while eager stacks them."""
    experts = draw_experts(variant, BF16, num_experts=8, hidden_size=256, intermediate_size=512)
    with LiveBytes() as live:
        probe_backend("grouped_mm", run_experts_grouped_mm, experts, BF16, is_weighted=True)
    two_in_fp32 = 2 * 3 * 256 * 512 * 4
    assert live.most < copies * two_in_fp32


def test_a_tensor_that_is_zero_must_be_zero():
    """With W2 = 0 the output, and all gradients but W2's, are zero: nothing to be relative to."""
    experts = draw_experts("full")
    experts = replace(experts, down_proj=torch.zeros_like(experts.down_proj).requires_grad_())
    found = probe_backend("a", run_experts_grouped_mm, experts, FP32, is_weighted=True)
    assert found.tensor == "gradient of down_proj"

    def add_a_little(tokens, order, weights, experts):
        return run_experts_eager(tokens, order, weights, experts) + 1e-20

    with pytest.raises(ConfigurationError, match=r"its output is off by .*the 0\.0e\+00 that"):
        probe_backend("a", add_a_little, experts, FP32, is_weighted=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_blamed_on_the_backend(value):
    experts = draw_experts("full")
    experts.down_proj.data[1, 2, 3] = value
    with pytest.raises(CheckpointError) as refusal:
        probe_backend("triton", return_nan, experts, FP32, is_weighted=True)
    assert str(refusal.value) == (
        "down_proj of the first experts holds values that are not finite in float32, so kernel "
        "triton cannot be checked and nothing can be trained: the model or checkpoint that it came "
        "from is damaged."
    )


def test_what_eager_cannot_hold_either_is_not_blamed_on_the_backend():
    """fp16 ends at 65504: a gate whose values go beyond gives the backend's NaN a reason."""
    gate = ActivationGate(lambda x: x * 1e5)
    experts = replace(draw_experts("full", torch.float16), gate=gate)
    probe_backend("a", return_nan, experts, torch.float16, is_weighted=True)


def test_what_is_not_probed():
    assert find_unprobed_reason("grouped_mm", BF16) is None
    assert find_unprobed_reason("eager", BF16) == "eager is what other kernels are compared with"
    assert find_unprobed_reason("triton", torch.float64) == (
        "there is nothing more precise than float64 to compare with"
    )
