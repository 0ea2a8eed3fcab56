"""Others' layers as contenders: transformers, PEFT, and axolotl's kernels where installed.

For measuring only; none of their code is part of this repository.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu
from transformers import MixtralConfig
from transformers.integrations import moe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.expert_lora.adapters import file_key
from benchmarks.harness.contender import Contender, SkippedError
from benchmarks.moe_layer.cases import Case
from benchmarks.moe_layer.inputs import ADAPTERS, PROJECTIONS, LayerInputs, LayerWeights
from benchmarks.moe_layer.ours import (
    RunLayer,
    build_contender,
    low_rank_factors,
    trained_leaves,
)
from megablocks_utils.kernels.weights import LowRank
from megablocks_utils.lora.peft_format import (
    linear_key,
    pack_lora_a,
    pack_lora_b,
    unpack_lora_a,
    unpack_lora_b,
)

AXOLOTL_MODULES = ("axolotl.integrations.kernels.libs.scattermoe_lora", "scattermoe_lora")
"""Where axolotl keeps its kernels, and the name of that folder alone on the path."""
_PEFT_FORM = {"A": (pack_lora_a, unpack_lora_a), "B": (pack_lora_b, unpack_lora_b)}


def build_transformers(
    implementation: str, case: Case, weights: LayerWeights, inputs: LayerInputs
) -> Contender:
    """Build transformers' own experts, with split adapters in `lora` modes.

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
    run: RunLayer = _add_split_lora(experts, adapters) if adapters else experts
    return build_contender(run, inputs, trained, (*experts.parameters(), *trained.values()))


def build_peft(case: Case, weights: LayerWeights, inputs: LayerInputs) -> Contender:
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
    trained: dict[str, Tensor] = {}
    to_common: dict[str, Callable[[Tensor], Tensor]] = {}
    for name in ADAPTERS:
        projection, _, factor = name.partition(".lora_")
        pack, unpack = _PEFT_FORM[factor]
        inner = ".base_layer" if projection == PROJECTIONS[0] else ""  # PEFT's wrappers
        trained[name] = by_key[linear_key(f"experts{inner}", factor)]
        trained[name].data.copy_(pack(weights.adapters[name]))
        to_common[name] = partial(unpack, num_experts=case.shape.num_experts)
    return build_contender(block.experts, inputs, trained, peft.parameters(), to_common=to_common)


def build_axolotl(case: Case, weights: LayerWeights, inputs: LayerInputs) -> Contender:
    """Build ScatterMoE with axolotl's fused adapters, with the options it is fastest with.

    Raises:
        SkippedError: not installed.
    """
    kernels = _import_axolotl()
    trained = trained_leaves(case, weights)
    factors, to_common = _axolotl_factors(trained, case.shape.num_experts)
    trained |= factors
    tensors = weights.named() | trained

    def project(rows: Tensor, name: str, top_k: int, order: tuple, **options: Any) -> Tensor:
        weight = tensors[name].transpose(1, 2)
        if not factors:
            return kernels.parallel_linear(rows, weight, top_k, *order, **options)
        lora = {f"lora_{factor}": tensors[f"{name}.lora_{factor}"] for factor in "AB"}
        options |= {"scaling": weights.scaling, "use_fused_dX": True, "use_fused_gather": True}
        return kernels.parallel_linear_lora(rows, weight, top_k, *order, **lora, **options)

    def run(tokens: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        order = kernels.flatten_sort_count(top_k_index, num_experts=case.shape.num_experts)
        gate_up = project(tokens, "gate_up_proj", case.shape.top_k, order, grouped_out=True)
        gate, up = gate_up.chunk(2, dim=-1)
        return project(silu(gate) * up, "down_proj", 1, order, grouped_in=True, gates=top_k_weights)

    return build_contender(run, inputs, trained, tensors.values(), to_common=to_common)


def _add_split_lora(experts: nn.Module, adapters: Mapping[str, LowRank]) -> RunLayer:
    """Return the forward pass of transformers' `experts` with adapters by projection.

    Split means that no W + scaling * B A is made: where transformers multiplies rows by the weights
    of their experts, two more grouped products pass the same rows through A and B, and their result
    is added in place, as in the fastest public trainers on torch's operators. Everything around it
    (sort, gather, gate, routing weights, sum over experts) is `grouped_mm_experts_forward` of the
    installed transformers, unchanged: only its linear layer is replaced for the call.
    """
    own_linear = moe._grouped_linear
    by_weight = {id(getattr(experts, name)): lora for name, lora in adapters.items()}

    def linear(
        input: Tensor,
        weight: Tensor,
        offs: Tensor,
        bias: Tensor | None = None,
        is_transposed: bool = False,
    ) -> Tensor:
        output = own_linear(input, weight, offs, bias, is_transposed)
        lora = by_weight[id(weight)]
        lora_rows = grouped_mm(input, lora.lora_a.transpose(1, 2), offs=offs) * lora.scaling
        return output.add_(grouped_mm(lora_rows, lora.lora_b.transpose(1, 2), offs=offs))

    def forward(tokens: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        moe._grouped_linear = linear
        try:
            return experts(tokens, top_k_index, top_k_weights)
        finally:
            moe._grouped_linear = own_linear

    return forward


class _Block(nn.Module):
    """A parent of the experts, by which PEFT finds them."""

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
    for name in PROJECTIONS:  # shared memory: nobody writes to it
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
) -> tuple[dict[str, Tensor], dict[str, Callable[[Tensor], Tensor]]]:
    """Return adapters in axolotl's form, A (E * r, in) and B (out, E * r), and the way back."""
    factors: dict[str, Tensor] = {}
    to_common: dict[str, Callable[[Tensor], Tensor]] = {}
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
