"""What is read off transformers' experts: enough to compute what they compute, and true."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.gate import KnownGate
from megablocks_utils.moe.expert_spec import (
    find_expert_modules,
    find_expert_parameters,
    read_expert_spec,
)
from megablocks_utils.moe.model_facts import find_top_k, num_layers, vocab_size
from megablocks_utils.moe.own_gate import OwnGate
from megablocks_utils.moe.reference import experts_reference
from tests.support.compare import relative_error
from tests.support.tiny_families import build_tiny

# One a kind: biases and interleaving, transposing, clamps before and after, another activation, no
# gate, a gate of its own, a norm, zero experts.
FAMILIES = (
    "gpt_oss",
    "aria_text",
    "deepseek_v4",
    "step3p7",
    "gemma4_text",
    "nemotron_h",
    "inkling2_text",
    "muse_spark",
    "longcat_flash",
)


def first_experts(family, **more):
    model = build_tiny(family, **more)
    config = model.config.get_text_config()
    config._experts_implementation = "eager"
    return next(iter(find_expert_modules(model).values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_computes_what_transformers_computes(family):
    """Values and every gradient; inputs far enough out that clamps hold."""
    module = first_experts(family).double()
    spec = read_expert_spec(module)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, spec.hidden_size, generator=generator, dtype=torch.float64) * 4
    numbers = spec.num_experts + spec.num_zero_experts
    index = torch.rand(23, numbers, generator=generator).argsort(-1)[:, :3]
    weights = torch.rand(23, 3, generator=generator, dtype=torch.float64)
    upstream = torch.randn(23, spec.hidden_size, generator=generator, dtype=torch.float64)
    leaves = [hidden.requires_grad_(), weights.requires_grad_(), *module.parameters()]
    wanted = module(hidden, index, weights)
    tensors = {name: getattr(module, name)[: spec.num_experts] for name in spec.parameter_names}
    norm = module.post_expert_norm if spec.has_post_norm else lambda rows: rows
    seen = experts_reference(hidden, index, weights, spec.build_weights(tensors), post_norm=norm)
    # These two compute their gate or norm in fp32, whatever they are given.
    bound = 1e-6 if family in ("inkling2_text", "muse_spark") else 1e-12
    assert relative_error(seen, wanted) < bound
    grads = (torch.autograd.grad(output, leaves, upstream) for output in (seen, wanted))
    for grad, expected in zip(*grads, strict=True):
        assert expected.norm() > 0 and relative_error(grad, expected) < bound


def test_a_gate_that_no_kernel_knows_keeps_no_weights_alive():
    module = first_experts("inkling2_text")
    gate = read_expert_spec(module).gate
    assert isinstance(gate, OwnGate) and not list(gate.apply.__self__.parameters())
    weights = weakref.ref(module.gate_up_proj)
    del module
    gc.collect()
    assert weights() is None


def test_layers_may_differ_in_a_number_of_their_gates():
    """Gates are recognised once for layers of a kind, and these are not of one kind."""
    module = first_experts("step3p7")
    other = copy.deepcopy(module)
    other.limit = 0.5
    limits = [read_expert_spec(part).gate.limit for part in (module, other)]
    assert limits == [module.limit, 0.5]


def test_shared_experts_are_not_taken_for_experts():
    model = build_tiny("inkling_text")
    assert any(name.endswith("mlp.shared_experts") for name, _ in model.named_modules())
    assert {name.rpartition(".")[2] for name in find_expert_modules(model)} == {"experts"}


def test_biases_are_parameters_of_the_experts_and_the_routers_are_not():
    names = {
        name.partition("experts.")[2] for name in find_expert_parameters(build_tiny("gpt_oss"))
    }
    assert names == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}


def test_what_the_interface_does_not_describe_is_refused():
    module = first_experts("mixtral")
    assert isinstance(read_expert_spec(module).gate, KnownGate)
    module.scale = nn.Parameter(torch.ones(8))
    with pytest.raises(ConfigurationError) as refusal:
        read_expert_spec(module)
    assert str(refusal.value) == (
        "MixtralExperts has a parameter scale, and transformers' experts interface does not say "
        "what it does."
    )
    del module.scale
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.detach().mT.contiguous())
    with pytest.raises(ConfigurationError, match=r"gate_up_proj of MixtralExperts is \(8, 64,"):
        read_expert_spec(module)


@pytest.mark.parametrize("family", ["gemma4", "hunyuan_v1_moe", "longcat_flash"])
def test_facts_that_configs_call_otherwise(family):
    model = build_tiny(family)
    layers = 2 if family == "longcat_flash" else 4  # whose config counts attentions
    assert (find_top_k(model), num_layers(model), vocab_size(model)) == (2, layers, 128)
