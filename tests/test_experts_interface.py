"""Any transformers model on this project's kernels, against transformers' own eager experts."""

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, DeepseekV4Config
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

from megablocks_utils import experts_interface, register_experts_implementation
from megablocks_utils.errors import ConfigurationError, MissingKernelError
from megablocks_utils.kernels.backends import backend
from megablocks_utils.kernels.device import read_device_facts
from megablocks_utils.kernels.gate import SWIGLU, Clamp, KnownGate
from megablocks_utils.moe.expert_spec import find_expert_modules, read_expert_spec
from tests.support.compare import relative_error
from tests.support.tiny_families import build_tiny
from tests.support.tiny_models import build_tiny_model

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"]
# Triton's interpreter is slow: the plain form and the one with all variants at once.
CASES = [
    *(("grouped_mm", family) for family in FAMILIES),
    *(("triton", family) for family in ("mixtral", "gpt_oss")),
]
TOKENS = torch.arange(3, 23).view(2, 10)
GPT_OSS_GATE = KnownGate(clamp=Clamp.GPT_OSS, limit=7.0, alpha=1.702)


@pytest.fixture(autouse=True)
def registered():
    """Register, and leave transformers as it was."""
    with mock.patch.dict(ALL_EXPERTS_FUNCTIONS._global_mapping):
        register_experts_implementation()
        yield


def build(family, kernel, **overrides):
    implementation = kernel if kernel == "eager" else f"megablocks_utils_{kernel}"
    model = build_tiny_model(family, **overrides)
    model.set_experts_implementation(implementation)
    return model


def run(model):
    """Return logits and every gradient, by name."""
    logits = model(TOKENS, use_cache=False).logits
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    logits.backward(upstream.to(logits.dtype))
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(("kernel", "family"), CASES)
def test_logits_and_gradients_are_those_of_eager(kernel, family):
    """The bound is twice what eager in fp32 is off from eager in fp64.

    That of a tensor of few numbers may be small by luck: it is at least that of the logits, with
    room for what the norm of n random numbers varies by (as in `kernels.probing`).
    """
    exact = run(build(family, "eager", num_hidden_layers=1).double())
    baseline = run(build(family, "eager", num_hidden_layers=1))
    seen = run(build(family, kernel, num_hidden_layers=1))
    assert seen.keys() == exact.keys() and len(exact) > 10
    for name, wanted in exact.items():
        assert wanted.norm() > 0, name
        own = max(relative_error(baseline[key], exact[key]) for key in (name, "logits"))
        bound = 2 * own * (1 + 4 / wanted.numel() ** 0.5)
        assert relative_error(seen[name], wanted) <= bound, name


@pytest.mark.parametrize("kernel", ["grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_checkpointing_generation_and_copies(family, kernel):
    plain, eager = build(family, kernel), build(family, "eager")
    with torch.no_grad():
        assert relative_error(plain(TOKENS).logits, eager(TOKENS).logits) < 1e-5
    prompt = TOKENS[:, :8]
    words = plain.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(words, eager.generate(prompt, max_new_tokens=4, do_sample=False))
    checkpointed = copy.deepcopy(plain).train()
    checkpointed.gradient_checkpointing_enable()
    copied, wanted = run(checkpointed), run(plain.train())
    assert all(torch.equal(copied[name], wanted[name]) for name in wanted)


def test_autocast_is_that_of_a_linear_layer():
    def run_in_bf16(kernel):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(build("mixtral", kernel))

    exact = run(build("mixtral", "eager").double())
    seen, baseline = run_in_bf16("grouped_mm"), run_in_bf16("eager")
    for name in ("logits", "model.layers.1.mlp.experts.down_proj"):
        assert seen[name].dtype == baseline[name].dtype
        error, own = (relative_error(x[name], exact[name]) for x in (seen, baseline))
        assert own / 4 < error <= 2 * own  # not in fp32 either


@pytest.mark.parametrize(
    ("family", "gate"),
    [("mixtral", SWIGLU), ("gpt_oss", GPT_OSS_GATE)],
)
def test_gate_is_recognised_once_by_its_values(family, gate):
    model = build(family, "grouped_mm")
    with mock.patch.object(
        experts_interface, "read_expert_spec", wraps=read_expert_spec
    ) as read_spec:
        model(TOKENS)
        assert read_spec.call_count == 2  # layers
        model(TOKENS)
        assert read_spec.call_count == 2
    for layer in model.model.layers:
        assert experts_interface._read_spec(layer.mlp.experts).gate == gate


def test_another_gate_is_never_taken_for_one_that_is_known():
    """GPT-OSS's gate with another alpha than it says; and a limit far beyond what values reach."""
    module = build("gpt_oss", "eager").model.layers[0].mlp.experts
    own_gate = type(module)._apply_gate

    def changed(self, gate_up):
        self.alpha, said = 1.5, self.alpha
        result = own_gate(self, gate_up)
        self.alpha = said
        return result

    with mock.patch.object(type(module), "_apply_gate", changed):
        assert not isinstance(read_expert_spec(module).gate, KnownGate)
    assert read_expert_spec(module).gate == GPT_OSS_GATE
    far = build_deepseek_experts(swiglu_limit=150.0)
    assert read_expert_spec(far).gate == KnownGate(clamp=Clamp.BEFORE, limit=150.0)


def build_deepseek_experts(**options):
    """Return experts with a gate of their own: SwiGLU of clamped values."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 96, "n_routed_experts": 4}
    module = DeepseekV4Experts(DeepseekV4Config(**sizes, **options))
    module.config._experts_implementation = "megablocks_utils_grouped_mm"
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return module


def test_another_gate_runs_as_the_module_computes_it():
    """Limit 0.5: most of its values are clamped."""
    torch.manual_seed(0)
    module = build_deepseek_experts(swiglu_limit=0.5)
    tokens, weights = torch.randn(33, 64, requires_grad=True), torch.rand(33, 2)
    index = torch.randint(4, (33, 2))
    upstream = torch.randn(33, 64)

    def run_module(implementation, dtype):
        module.config._experts_implementation = implementation
        output = module.to(dtype)(tokens.to(dtype), index, weights.to(dtype))
        inputs = [tokens, *module.parameters()]
        return [output, *torch.autograd.grad(output, inputs, upstream.to(dtype))]

    seen = run_module("megablocks_utils_grouped_mm", torch.float32)
    baseline = run_module("eager", torch.float32)
    exact = run_module("eager", torch.float64)
    for ours, own, wanted in zip(seen, baseline, exact, strict=True):
        assert relative_error(ours, wanted) <= 2 * relative_error(own, wanted)


def test_triton_refuses_a_gate_that_is_not_in_its_kernels():
    module = next(iter(find_expert_modules(build_tiny("inkling2_text")).values()))
    module.config._experts_implementation = "megablocks_utils_triton"
    assert meet_refusal(module) == (
        'experts_implementation="megablocks_utils_triton" cannot run Inkling2Experts: triton knows '
        "gates and activations with silu, gelu_tanh or relu_squared, and this model's is another."
    )


@pytest.mark.parametrize("family", ["nemotron_h", "muse_spark"])
def test_experts_without_a_gate_or_with_a_norm_behind_them(family):
    module = next(iter(find_expert_modules(build_tiny(family)).values()))
    torch.manual_seed(0)
    tokens, weights = torch.randn(33, 32, requires_grad=True), torch.rand(33, 2)
    index = torch.randint(8, (33, 2))
    results = []
    for implementation in ("megablocks_utils_grouped_mm", "eager"):
        module.config._experts_implementation = implementation
        output = module(tokens, index, weights)
        leaves = [tokens, *module.parameters()]
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for seen, wanted in zip(*results, strict=True):
        assert relative_error(seen, wanted) < 1e-5


def test_triton_needs_a_gpu_or_its_interpreter():
    module = first_experts("triton")
    facts = replace(read_device_facts("cpu"), is_interpreter=False)
    with mock.patch.object(experts_interface, "_read_device_facts", lambda _: facts):
        assert "triton needs a CUDA device" in meet_refusal(module)


def test_triton_that_is_missing_is_an_error_with_its_install_line():
    with (
        mock.patch.object(backend, "find_spec", return_value=None),
        pytest.raises(MissingKernelError) as refusal,
    ):
        build("mixtral", "triton")(TOKENS)
    assert str(refusal.value) == (
        'experts_implementation="megablocks_utils_triton" needs triton, which is not installed; '
        "install it with: pip install triton"
    )


def first_experts(kernel):
    return build("mixtral", kernel).model.layers[0].mlp.experts


def meet_refusal(module, dtype=torch.float32):
    index = torch.zeros(5, 1, dtype=torch.int64)
    with pytest.raises(ConfigurationError) as refusal:
        module(torch.zeros(5, 64, dtype=dtype), index, torch.ones(5, 1))
    return str(refusal.value)


def test_what_is_refused_is_named():
    def refusal(**attributes):
        module = first_experts("grouped_mm")
        for name, value in attributes.items():
            setattr(module, name, value)
        sentence = meet_refusal(module)
        start = 'experts_implementation="megablocks_utils_grouped_mm" cannot run MixtralExperts: '
        assert sentence.startswith(start)
        return sentence.removeprefix(start)

    frozen = {"requires_grad": False}
    small = nn.Parameter(torch.zeros(4, 64, 96, dtype=torch.int8), **frozen)
    assert refusal(_is_expert_parallel=True) == (
        "its experts are split over processes: use shard_moe for that."
    )
    assert refusal(down_proj=small) == "its down_proj is int8, not float32, bfloat16 or float16."
    odd = nn.Parameter(torch.zeros(4, 64, 90)), nn.Parameter(torch.zeros(4, 180, 64))
    assert refusal(down_proj=odd[0], gate_up_proj=odd[1]) == (
        "grouped_mm needs intermediate_size (90) to be a multiple of 4 in float32."
    )


def refuse_dtensors(rank):
    register_experts_implementation()
    module = first_experts("grouped_mm")
    mesh = init_device_mesh("cpu", (1,))
    weights = DTensor.from_local(module.down_proj.detach(), mesh, [Shard(0)])
    module.down_proj = nn.Parameter(weights)
    return meet_refusal(module)


def test_weights_that_are_split_are_refused(ranks1):
    assert ranks1.run(refuse_dtensors) == [
        'experts_implementation="megablocks_utils_grouped_mm" cannot run MixtralExperts: its '
        "down_proj is split over processes (a DTensor): use shard_moe for that."
    ]


def test_registering_is_what_makes_the_names_valid():
    config = build_tiny_model("mixtral").config
    name = "megablocks_utils_grouped_mm"
    before = dict(ALL_EXPERTS_FUNCTIONS._global_mapping)
    register_experts_implementation()
    assert ALL_EXPERTS_FUNCTIONS._global_mapping.keys() == before.keys()
    model = AutoModelForCausalLM.from_config(config, experts_implementation=name)
    assert model.config._experts_implementation == name
    for registered_name in (name, "megablocks_utils_triton"):
        del ALL_EXPERTS_FUNCTIONS._global_mapping[registered_name]
        with pytest.raises(ValueError, match="is not supported"):
            AutoModelForCausalLM.from_config(config, experts_implementation=registered_name)


def test_modules_that_are_only_transposed_or_only_interleaved():
    """Every layout that transformers' decorator can describe gives the same result."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(4, 192, 64, generator=generator) * 0.1
    down = torch.randn(4, 64, 96, generator=generator) * 0.1
    tokens = torch.randn(9, 64, generator=generator)
    index = torch.randint(4, (9, 2), generator=generator)
    interleaved = gate_up.unflatten(1, (2, 96)).transpose(1, 2).flatten(1, 2)
    results = []
    for is_concatenated, weights in ((True, gate_up), (False, interleaved)):
        for is_transposed in (False, True):
            module = make_module(
                is_concatenated=is_concatenated, is_transposed=is_transposed, has_bias=False
            )
            module.gate_up_proj = nn.Parameter(weights.mT if is_transposed else weights)
            module.down_proj = nn.Parameter(down.mT if is_transposed else down)
            results.append(module(tokens, index, torch.ones(9, 2)))
    assert all(relative_error(result, results[0]) < 1e-6 for result in results[1:])


def make_module(**flags):
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()

        def _apply_gate(self, gate_up):
            if flags["is_concatenated"]:
                gate, up = gate_up.chunk(2, dim=-1)
            else:
                gate, up = gate_up[..., ::2], gate_up[..., 1::2]
            return nn.functional.gelu(gate) * up

        def forward(self, *inputs):
            raise AssertionError("the module's own forward pass")

    config = mock.Mock(_experts_implementation="megablocks_utils_grouped_mm")
    return use_experts_implementation(Experts, **flags)(config)
