"""One layer of experts with adapters, both ways."""

import math

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.expert_lora.adapters import (
    ALPHA,
    OURS,
    PEFT,
    RANK,
    adapters_of,
    build_contender,
    build_lora_config,
    file_key,
    fill_b,
    in_peft_form,
)
from benchmarks.harness.case import LayerShape
from benchmarks.harness.contender import Contender
from megablocks_utils.kernels.selection.backend_selection import select_and_load_backend
from megablocks_utils.kernels.shapes import ExpertShapes
from megablocks_utils.lora.expert_adapters import attach_expert_lora
from megablocks_utils.lora.settings import LoraSettings, same_rank_everywhere
from megablocks_utils.mesh.device_mesh import build_mesh, compute_mesh_sizes
from megablocks_utils.mesh.placement import local_tensor, wrap_local_experts
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.moe.expert_spec import ExpertSpec, read_parameter_names
from megablocks_utils.moe.sharded_moe import ShardedMoE


def build_layers(
    shape: LayerShape, num_tokens: int, backend: str, device: torch.device
) -> dict[str, Contender]:
    """Build the experts of one layer both ways, with the same tokens and the same routing."""
    generator = torch.Generator().manual_seed(0)
    ours = _our_layer(shape, backend, device, generator)
    peft, peft_experts = _peft_layer(shape, backend, ours)
    hidden = torch.randn(num_tokens, shape.hidden_size, generator=generator)
    scores = torch.randn(num_tokens, shape.num_experts, generator=generator)
    weights, index = scores.softmax(-1).topk(shape.top_k)
    upstream = torch.randn(hidden.shape, generator=generator).to(device)
    index = index.to(device)

    def build(module: nn.Module, experts: nn.Module) -> Contender:
        x, w = (t.detach().to(device, copy=True).requires_grad_() for t in (hidden, weights))
        inputs = {"hidden_states": x, "top_k_weights": w}
        return build_contender(module, lambda: experts(x, index, w), inputs, upstream)

    return {OURS: build(ours, ours.experts), PEFT: build(peft, peft_experts)}


class _Block(nn.Module):
    """A parent of the experts, by which PEFT finds them."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


def _our_layer(
    shape: LayerShape, backend: str, device: torch.device, generator: torch.Generator
) -> _Block:
    sizes = compute_mesh_sizes(dist.get_world_size(), 1, shape.num_experts)
    mesh = build_mesh(sizes, device.type)
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    rows_and_columns = (2 * intermediate, hidden), (hidden, intermediate)
    weights = [
        torch.randn(shape.num_experts, *size, generator=generator) / math.sqrt(size[1])
        for size in rows_and_columns
    ]
    choice = select_and_load_backend(
        backend, ExpertShapes(hidden, intermediate, torch.float32, device.type)
    )
    spec = ExpertSpec(shape.num_experts, hidden, intermediate)
    layer = DroplessExperts(
        spec,
        {
            name: wrap_local_experts(weight.to(device), mesh)
            for name, weight in zip(spec.projections, weights, strict=True)
        },
        mesh=mesh,
        backend=choice.run,
    )
    block = _Block(layer).requires_grad_(False)
    sharded = ShardedMoE(block, mesh, {"experts": layer}, "shard", choice)
    settings = LoraSettings(RANK, ALPHA, expert_ranks=same_rank_everywhere(RANK, block))
    attach_expert_lora(sharded, settings, dtype=torch.float32, seed=0)
    fill_b(block)
    return block


def _peft_layer(shape: LayerShape, backend: str, ours: _Block) -> tuple[PeftModel, nn.Module]:
    """Return the model with our weights and adapters, and its adapted experts."""
    config = MixtralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_local_experts=shape.num_experts,
    )
    config._experts_implementation = backend  # as `from_config(experts_implementation=...)` does
    with torch.device("meta"):
        experts = MixtralExperts(config)
    for name in read_parameter_names(ours.experts):  # shared memory: nobody writes to it
        weights = local_tensor(getattr(ours.experts, name).detach())
        setattr(experts, name, nn.Parameter(weights))
    block = _Block(experts)
    peft = get_peft_model(block, build_lora_config("experts"))
    wanted = dict(in_peft_form(name, parameter) for name, parameter in adapters_of(ours))
    with torch.no_grad():
        for name, parameter in adapters_of(peft):
            parameter.copy_(wanted.pop(file_key(name)))
    return peft, block.experts
