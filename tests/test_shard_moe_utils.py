"""`shard_moe` as Python users call it: same model, split experts, clear refusals."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig

from megablocks_utils import shard_moe
from megablocks_utils.checkpoint.load import build_model_on_meta
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.shard_moe_utils import find_expert_modules
from tests.support.compare import relative_error
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


def test_models_of_other_families_are_refused_by_name():
    small = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 8, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(intermediate_size=16, **small))
    with pytest.raises(ConfigurationError) as refusal:
        find_expert_modules(dense)
    families = "expert parallelism works for mixtral, qwen3_moe, olmoe."
    assert str(refusal.value) == (
        f"model type llama has no experts that could be split; {families}"
    )
    other = AutoModelForCausalLM.from_config(
        Qwen2MoeConfig(num_experts=2, moe_intermediate_size=8, intermediate_size=16, **small)
    )
    with pytest.raises(ConfigurationError) as refusal:
        find_expert_modules(other)
    assert str(refusal.value) == f"model type qwen2_moe is not supported yet; {families}"


def test_experts_of_a_foreign_layout_are_refused():
    model = build_tiny_model("mixtral")
    model.get_submodule(MODULES[1]).is_transposed = True
    with pytest.raises(ConfigurationError) as refusal:
        find_expert_modules(model)
    assert str(refusal.value) == (
        "the experts of model.layers.1.mlp.experts have is_transposed=True, but only False is "
        "supported."
    )
