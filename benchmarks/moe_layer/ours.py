"""Our backends as contenders, and the one place that asks the package for a backend."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.contender import Contender, SkippedError
from benchmarks.moe_layer.cases import Case
from benchmarks.moe_layer.inputs import ADAPTERS, PROJECTIONS, LayerInputs, LayerWeights
from megablocks_utils.errors import UserError
from megablocks_utils.kernels.gate import SWIGLU
from megablocks_utils.kernels.permute import sort_by_expert
from megablocks_utils.kernels.selection.backend_selection import (
    LoadedBackend,
    select_and_load_backend,
)
from megablocks_utils.kernels.shapes import ExpertShapes
from megablocks_utils.kernels.weights import ExpertWeights, LowRank
from megablocks_utils.mesh.device_mesh import build_mesh, compute_mesh_sizes
from megablocks_utils.mesh.placement import local_tensor, wrap_local_experts
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.moe.expert_lora import ExpertLora
from megablocks_utils.moe.expert_spec import ExpertSpec

RunLayer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(tokens, top_k_index, top_k_weights) -> (T, H)."""


def find_backend(kernel: str, case: Case, device: torch.device) -> LoadedBackend:
    """Return our backend of that name for the case.

    Raises:
        SkippedError: it is missing here, or not made for the case; the reason is its own.
    """
    shape = case.shape
    shapes = ExpertShapes(
        shape.hidden_size,
        shape.intermediate_size,
        getattr(torch, case.dtype),
        device.type,
        mode="lora" if case.mode.rank else case.mode.name,
        num_local_experts=shape.num_experts,
        top_k=shape.top_k,
        num_rows=case.num_tokens * shape.top_k,
    )
    try:
        return select_and_load_backend(kernel, shapes)
    except UserError as refusal:
        raise SkippedError(str(refusal)) from refusal


def build_contender(
    run: RunLayer,
    inputs: LayerInputs,
    trained: Mapping[str, Tensor],
    constants: Iterable[Tensor],
    **settings: Any,
) -> Contender:
    """Return a layer, called as `run(tokens, top_k_index, top_k_weights)`, as a contender."""
    return Contender(
        lambda: run(inputs.tokens, inputs.top_k_index, inputs.top_k_weights),
        inputs.leaves(),
        trained,
        tuple(constants),
        inputs.upstream,
        **settings,
    )


def build_backend_contender(
    kernel: str, case: Case, weights: LayerWeights, inputs: LayerInputs
) -> Contender:
    """Build a backend as `DroplessExperts` calls it on one rank: sort by expert, then run.

    Raises:
        SkippedError: the backend is missing here or not made for the case.
    """
    choice = find_backend(kernel, case, inputs.device)
    trained = trained_leaves(case, weights)
    experts = _experts_of(weights, trained)

    def run(tokens: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        order = sort_by_expert(top_k_index, case.shape.num_experts)
        try:
            return choice.run(tokens, order, top_k_weights, experts)
        except UserError as refusal:
            raise SkippedError(str(refusal)) from refusal

    constants = (weights.named() | trained).values()
    return build_contender(run, inputs, trained, constants, note=choice.reason)


def build_layer_contender(
    kernel: str, case: Case, weights: LayerWeights, inputs: LayerInputs
) -> Contender:
    """Build the whole layer of the package, with its DTensors, on a mesh of one rank."""
    choice = find_backend(kernel, case, inputs.device)
    mesh = build_mesh(compute_mesh_sizes(1, 1, case.shape.num_experts), inputs.device.type)
    layer = DroplessExperts(
        ExpertSpec(*weights.down_proj.shape),
        {name: wrap_local_experts(getattr(weights, name), mesh) for name in PROJECTIONS},
        mesh=mesh,
        backend=choice.run,
    ).requires_grad_(case.mode.trains_weights)
    for name in PROJECTIONS if weights.adapters else ():
        lora_a, lora_b = (
            wrap_local_experts(weights.adapters[f"{name}.lora_{factor}"], mesh) for factor in "AB"
        )
        setattr(layer, f"{name}_lora", ExpertLora(lora_a, lora_b, weights.scaling))
    parameters = {
        name.replace("_lora.", "."): parameter for name, parameter in layer.named_parameters()
    }
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    to_common = dict.fromkeys(trained, local_tensor)
    return build_contender(layer, inputs, trained, parameters.values(), to_common=to_common)


def trained_leaves(case: Case, weights: LayerWeights) -> dict[str, Tensor]:
    """Return what the mode trains as leaves that share its memory."""
    names = PROJECTIONS if case.mode.trains_weights else tuple(weights.adapters)
    named = weights.named()
    return {name: named[name].detach().requires_grad_() for name in names}


def low_rank_factors(tensors: dict[str, Tensor], scaling: float) -> dict[str, LowRank]:
    """Return the adapter of each projection from tensors by the names of `ADAPTERS`; or none."""
    if not tensors.keys() >= set(ADAPTERS):
        return {}
    return {
        name: LowRank(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], scaling)
        for name in PROJECTIONS
    }


def _experts_of(weights: LayerWeights, trained: dict[str, Tensor]) -> ExpertWeights:
    tensors = weights.named() | trained
    experts = ExpertWeights(tensors["gate_up_proj"], tensors["down_proj"], SWIGLU)
    lora = low_rank_factors(tensors, weights.scaling)
    return replace(experts, gate_up_lora=lora.get("gate_up_proj"), down_lora=lora.get("down_proj"))
