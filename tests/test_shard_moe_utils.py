"""`shard_moe` as Python users call it: same model, split experts, clear refusals."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from megablocks_utils import shard_moe
from megablocks_utils.checkpoint.load import build_model_on_meta
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.shard_moe_utils import require_experts
from tests.support.compare import relative_error
from tests.support.tiny_families import build_tiny
from tests.support.tiny_models import FAMILIES, build_tiny_model, save_tiny_model

TOKENS = torch.arange(3, 35)[None]
MODULES = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
NAMES = [f"{module}.{name}" for module in MODULES for name in ("gate_up_proj", "down_proj")]


def _shard_and_run(rank, family, ep_size, folder):
    """Shard a model that holds its weights (folder None), or read the experts from a folder."""
    model = build_tiny_model(family)
    if folder is not None:
        for name in NAMES:
            module, _, parameter = name.rpartition(".")
            owner = model.get_submodule(module)
            shape = getattr(owner, parameter).shape
            setattr(owner, parameter, torch.nn.Parameter(torch.empty(shape, device="meta")))
    sharded = shard_moe(model, ep_size=ep_size, checkpoint_name_or_path=folder)
    with torch.no_grad():
        logits = sharded.model(TOKENS + rank).logits
    dtensors = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    for parameter in sharded.expert_parameters.values():
        assert parameter.placements == (Shard(0),)
        assert parameter.device_mesh == sharded.mesh["ep"]
    assert sharded.mesh.mesh_dim_names == ("dp", "ep")
    assert list(sharded.expert_modules) == MODULES
    assert list(sharded.expert_parameters) == NAMES == dtensors
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_sharded_model_gives_the_same_logits(ranks4, family, from_checkpoint, tmp_path):
    """Each rank asks something else; the bound is a few units of fp32's last place."""
    model = save_tiny_model(family, tmp_path)
    folder = str(tmp_path) if from_checkpoint else None
    for ep_size in (1, 2, 4):
        for rank, logits in enumerate(ranks4.run(_shard_and_run, family, ep_size, folder)):
            with torch.no_grad():
                wanted = model(TOKENS + rank).logits
            assert relative_error(logits, wanted) < 1e-6


def _refuse(rank, model, arguments):
    with pytest.raises(ConfigurationError) as refusal:
        shard_moe(model, **arguments)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"ep_size": 3},
            "ep_size is 3, but it must divide the 2 processes of this run; 1 and 2 would work.",
        ),
        (
            {"ep_size": 2, "kernel": "fast"},
            "kernel is fast, but it must be auto, eager, grouped_mm, triton, scattermoe or "
            "megablocks.",
        ),
        (
            {"ep_size": 2, "expert_mode": "thawed"},
            "expert_mode is thawed, but it must be full, frozen or lora.",
        ),
        (
            {"ep_size": 2, "expert_dp": "copy"},
            "expert_dp is copy, but it must be shard or replicate.",
        ),
        ({"ep_size": 2, "device_type": "gpu"}, "device_type is gpu, but it must be cpu or cuda."),
    ],
)
def test_arguments_that_cannot_work(ranks2, arguments, sentence):
    model = build_tiny_model("mixtral")
    assert ranks2.run(_refuse, model, arguments) == [sentence] * 2


def _refuse_meta(rank, folder):
    model = build_model_on_meta(folder)
    return _refuse(rank, model, {"ep_size": dist.get_world_size()})


def test_a_model_without_weights_needs_a_checkpoint(ranks2, tmp_path):
    save_tiny_model("mixtral", tmp_path)
    assert (
        ranks2.run(_refuse_meta, str(tmp_path))
        == [
            "model.layers.0.mlp.experts has no weights (it is on the meta device); pass "
            "checkpoint_name_or_path."
        ]
        * 2
    )


def test_without_processes():
    with pytest.raises(ConfigurationError) as refusal:
        shard_moe(build_tiny_model("mixtral"), ep_size=1)
    assert str(refusal.value) == (
        "shard_moe needs torch.distributed to be initialised; launch with torchrun, or call "
        "torch.distributed.init_process_group first."
    )


def test_what_cannot_be_split_is_refused_by_what_it_is():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 8, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(intermediate_size=16, **small))
    with pytest.raises(ConfigurationError) as refusal:
        require_experts(dense)
    assert str(refusal.value) == "model type llama has no experts that could be split."
    with pytest.raises(ConfigurationError) as refusal:
        require_experts(build_tiny("jetmoe"))
    assert str(refusal.value) == (
        "the experts of model type jetmoe (JetMoeMoE) do not follow transformers' experts "
        "interface, and expert parallelism splits only those that do."
    )


def _loss(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")


def _examples():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 128, (1, length), generator=generator) for length in (19, 13)]


def _shard_and_differentiate(rank, family):
    """Each rank has its own example: the gradients of their sum, whole, and how many layers."""
    model = build_tiny(family).double()
    sharded = shard_moe(model, ep_size=2, device_type="cpu")
    _loss(model, _examples()[rank]).backward()
    grads = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if isinstance(grad, DTensor):
            grads[name] = grad.full_tensor()
        else:
            dist.all_reduce(grad)
            grads[name] = grad
    return grads, sharded.kernel.name


@pytest.mark.parametrize(
    "family",
    [
        "gpt_oss",  # biases, transposed, interleaved, a clamped gate of its own form
        "nemotron_h",  # no gate
        "deepseek_v4",  # a clamp before the activation
        "longcat_flash",  # zero experts, without transformers' mark
        "llama4_text",  # weights before the experts, without the mark, and transposed
        "muse_spark",  # a norm behind the experts; composite
        "ernie4_5_vl_moe",  # two kinds of experts in a layer
    ],
)
def test_every_kind_of_experts_has_the_gradients_of_stock(ranks2, family):
    stock = build_tiny(family).double()
    stock.set_experts_implementation("eager")
    for ids in _examples():
        _loss(stock, ids).backward()
    (grads, kernel), (others, _) = ranks2.run(_shard_and_differentiate, family)
    assert kernel == "eager"  # what auto has for fp64
    wanted = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in stock.named_parameters()
    }
    assert grads.keys() == wanted.keys()
    assert sum("experts" in name and grad.any() for name, grad in grads.items()) >= 4
    for name, grad in grads.items():  # some models compute parts in fp32, whatever they are given
        expected = wanted[name][: len(grad)]  # rows of zero experts are not there
        assert torch.equal(grad, others[name])
        assert (grad - expected).norm() <= 1e-6 * expected.norm() + 1e-12, name
