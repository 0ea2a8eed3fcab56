"""Other people's layers as sides: transformers, PEFT, and axolotl's kernels where installed.

For measuring only; nothing of theirs is part of this repository.
"""

import importlib
from collections.abc import Mapping
from types import ModuleType

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.expert_lora.adapters import file_key
from benchmarks.harness.contender import LayerSide, SkippedError
from benchmarks.moe_layer.cases import Case
from benchmarks.moe_layer.inputs import ADAPTERS, PROJECTIONS, LayerWeights
from benchmarks.moe_layer.ours import low_rank_factors, trained_leaves
from benchmarks.moe_layer.split_lora import forward_with_split_lora
from megablocks_utils.lora.peft_format import (
    expert_key,
    pack_lora_a,
    pack_lora_b,
    unpack_lora_a,
    unpack_lora_b,
)

AXOLOTL_MODULES = ("axolotl.integrations.kernels.libs.scattermoe_lora", "scattermoe_lora")
"""Where axolotl keeps its kernels, and the name of that folder alone on the path."""


def build_transformers_side(
    implementation: str, case: Case, weights: LayerWeights, device: torch.device
) -> LayerSide:
    """Build transformers' own experts, with split adapters (see `split_lora`) in `lora` modes.

    Raises:
        SkippedError: adapters without grouped_mm.
    """
    if case.mode.rank and implementation != "grouped_mm":
        raise SkippedError(
            f"transformers has no adapters for {implementation} experts; see peft and transformers"
        )
    trained = trained_leaves(case, weights)
    experts = _transformers_experts(implementation, case, weights.named() | trained)
    trained |= {name: p for name, p in experts.named_parameters() if p.requires_grad}
    adapters = low_rank_factors(trained, weights.scaling)
    run = forward_with_split_lora(experts, adapters) if adapters else experts
    return LayerSide(run, trained, (*experts.parameters(), *trained.values()))


def build_peft_side(case: Case, weights: LayerWeights, device: torch.device) -> LayerSide:
    """Build PEFT's `target_parameters` over transformers' grouped_mm experts.

    Adapters have the dtype of the experts: PEFT's default of fp32 would only add casts.

    Raises:
        SkippedError: nothing to adapt in this mode.
    """
    if not case.mode.rank:
        raise SkippedError("peft adds adapters, and this mode has none; see transformers")
    block = _Block(_transformers_experts("grouped_mm", case, weights.named()))
    config = LoraConfig(
        r=case.mode.rank,
        lora_alpha=int(weights.scaling * case.mode.rank),
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in PROJECTIONS],
    )
    peft = get_peft_model(block.requires_grad_(False), config, autocast_adapter_dtype=False)
    by_key = {file_key(name): parameter for name, parameter in peft.named_parameters()}
    trained, to_common = {}, {}
    for name in ADAPTERS:
        projection, _, side = name.partition(".lora_")
        trained[name] = by_key[expert_key(f"experts.{projection}", side)]
        pack, unpack = (pack_lora_a, unpack_lora_a) if side == "A" else (pack_lora_b, unpack_lora_b)
        trained[name].data.copy_(pack(weights.adapters[name]))
        to_common[name] = lambda grad, unpack=unpack: unpack(grad, case.shape.num_experts)
    run = peft.base_model.model.experts
    return LayerSide(run, trained, tuple(peft.parameters()), to_common)


def build_axolotl_side(case: Case, weights: LayerWeights, device: torch.device) -> LayerSide:
    """Build ScatterMoE with axolotl's fused adapters, with the options it is fastest with.

    Raises:
        SkippedError: not installed.
    """
    kernels = _import_axolotl()
    trained = trained_leaves(case, weights)
    factors, to_common = _axolotl_factors(trained, case.shape.num_experts)
    trained |= factors
    tensors = weights.named() | trained

    def project(rows: Tensor, name: str, top_k: int, order: tuple, **options) -> Tensor:
        weight = tensors[name].transpose(1, 2)
        if not factors:
            return kernels.parallel_linear(rows, weight, top_k, *order, **options)
        lora = {f"lora_{side}": tensors[f"{name}.lora_{side}"] for side in "AB"}
        options |= {"scaling": weights.scaling, "use_fused_dX": True, "use_fused_gather": True}
        return kernels.parallel_linear_lora(rows, weight, top_k, *order, **lora, **options)

    def run(tokens: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        order = kernels.flatten_sort_count(top_k_index, num_experts=case.shape.num_experts)
        hidden = project(tokens, "gate_up_proj", case.shape.top_k, order, grouped_out=True)
        gate, up = hidden.chunk(2, dim=-1)
        return project(silu(gate) * up, "down_proj", 1, order, grouped_in=True, gates=top_k_weights)

    return LayerSide(run, trained, tuple(tensors.values()), to_common)


class _Block(nn.Module):
    """The place of the experts in a model, by which PEFT finds them."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


def _transformers_experts(
    implementation: str, case: Case, tensors: Mapping[str, Tensor]
) -> MixtralExperts:
    config = MixtralConfig(
        hidden_size=case.shape.hidden_size,
        intermediate_size=case.shape.intermediate_size,
        num_local_experts=case.shape.num_experts,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = MixtralExperts(config)
    for name in PROJECTIONS:  # the same memory: nobody writes to it
        weight = nn.Parameter(tensors[name].detach(), requires_grad=case.mode.trains_weights)
        setattr(experts, name, weight)
    return experts


def _import_axolotl() -> ModuleType:
    reasons = []
    for name in AXOLOTL_MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as missing:
            reasons.append(f"{name}: {missing}")
    raise SkippedError(f"axolotl's kernels are not on the path ({'; '.join(reasons)})")


def _axolotl_factors(
    trained: Mapping[str, Tensor], num_experts: int
) -> tuple[dict[str, Tensor], dict]:
    """Return adapters in axolotl's form, A (E * r, in) and B (out, E * r), and the way back."""
    factors, to_common = {}, {}
    for name in ADAPTERS if ADAPTERS[0] in trained else ():
        factor = trained[name].detach()
        if name.endswith("A"):
            packed = factor.flatten(0, 1)
            to_common[name] = lambda grad: grad.unflatten(0, (num_experts, -1))
        else:
            packed = factor.transpose(0, 1).flatten(1)
            to_common[name] = lambda grad: grad.unflatten(1, (num_experts, -1)).transpose(0, 1)
        factors[name] = packed.contiguous().requires_grad_()
    return factors, to_common
