"""The layout of adapters that servers load: one LoRA pair for each expert and projection.

What the servers read, and where it is written:

- vLLM 01533aa8 (`vllm/lora/model_manager.py`, `_create_merged_loras_inplace`, and
  `lora_weights.py`, `pack_moe`): `...experts.0.gate_proj.lora_A.weight` (r, in) and `lora_B`
  (out, r) by the Hub's names of single experts; in a layer every expert has all of its projections
  or none, and all have one rank.
- vLLM 02143692 (`peft_helper.py`) reads one strength, `lora_alpha` over `r` of the configuration;
  it knows no `rank_pattern` or `alpha_pattern` and refuses `modules_to_save`.
- SGLang 00639c4d (`python/sglang/srt/lora/mem_pool.py`, `load_lora_weight_to_buffer`): the same
  names, gate_proj, up_proj and down_proj; every tensor has the rank `r` of the configuration.

So there is one rank and one strength: a pair of a smaller rank is filled up with zeros, which adds
nothing, and of the fused gate_up each half has all of A and its own rows of B.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from megablocks_utils.checkpoint.index import open_checkpoint
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.writer import TensorSpec
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.lora.adapter_reader import AdapterReader
from megablocks_utils.lora.expert_formats import FusedExperts
from megablocks_utils.lora.peft_format import (
    ExpertPlace,
    Shape,
    find_expert_places,
    linear_key,
    linear_matrices,
)
from megablocks_utils.lora.single_experts import SingleExpertNames
from megablocks_utils.moe.expert_spec import (
    find_expert_modules,
    read_expert_spec,
    read_parameter_names,
)

__all__ = ["PerExpertLayout", "plan_per_expert"]

_INSTEAD = "serve the model that megablocks_utils.merge makes of it instead"


@dataclass(frozen=True)
class PerExpertLayout:
    """Say which pairs the file holds, and of what they are made.

    Attributes:
        reader: the adapter as PEFT holds it.
        rank: of every pair.
        scaling: factor of every B @ A.
        dtype: of every tensor.
        linears: linear layer in the model -> its name on the Hub.
        experts: parameter of experts -> its place; one without adapters gets zeros.
        names: of the single experts' layers on the Hub.
    """

    reader: AdapterReader
    rank: int
    scaling: float
    dtype: torch.dtype
    linears: Mapping[str, str]
    experts: Mapping[str, ExpertPlace]
    names: SingleExpertNames

    @property
    def lora_alpha(self) -> float:
        """The strength over the rank; whole wherever it can be."""
        alpha = self.scaling * self.rank
        return round(alpha) if abs(alpha - round(alpha)) <= 1e-9 * alpha else alpha

    def specs(self) -> Iterator[TensorSpec]:
        """Announce every tensor, in the order of `tensors`."""
        for name, shape in self._layers():
            for matrix in linear_matrices(name, shape, self.rank):
                yield TensorSpec(matrix.key, matrix.shape, self.dtype)

    def _layers(self) -> Iterator[tuple[str, Shape]]:
        for name, stored in self.linears.items():
            yield stored, self.reader.linears[name].shape
        for name, place in self.experts.items():
            for expert in range(place.num_stored):
                for layer in self.names.layers(name, expert):
                    yield layer.name, layer.shape

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor; what is held is one linear layer's, or one parameter's of experts."""
        for name, stored in self.linears.items():
            yield from self._pair(stored, *self.reader.linear(name))
        for name, place in self.experts.items():
            lora_a, lora_b = self._read_experts(name, place)
            for expert in range(place.num_stored):
                for layer in self.names.layers(name, expert):
                    rows = slice(layer.rows.start, layer.rows.stop, layer.rows.step)
                    yield from self._pair(layer.name, lora_a[expert], lora_b[expert][rows])

    def _read_experts(self, name: str, place: ExpertPlace) -> tuple[Tensor, Tensor]:
        if name in self.reader.expert_parameters:
            return self.reader.experts(name, range(place.num_stored))
        num_experts, num_out, num_in = place.shape
        return torch.zeros(num_experts, 0, num_in), torch.zeros(num_experts, num_out, 0)

    def _pair(self, name: str, lora_a: Tensor, lora_b: Tensor) -> Iterator[tuple[str, Tensor]]:
        missing = self.rank - len(lora_a)
        yield linear_key(name, "A"), pad(lora_a, (0, 0, 0, missing)).to(self.dtype)
        yield linear_key(name, "B"), pad(lora_b, (0, missing)).to(self.dtype)


def plan_per_expert(reader: AdapterReader, model: PreTrainedModel, base: Path) -> PerExpertLayout:
    """Choose what an adapter becomes in the layout of the servers; no weight is read.

    Names are those of the base's own files where they are there, since transformers' mapping back
    to the Hub's names is not one to one for every family.

    Args:
        reader: the adapter.
        model: its base, on meta or not.
        base: folder of the base, with or without its weights.

    Raises:
        ConfigurationError: a server would load it wrongly or not at all.
        CheckpointError: the base's files are damaged or not all there.
    """
    _refuse_other_tensors(reader, model)
    has_weights = any(base.glob("*.safetensors"))
    stored = ModelLayout(model, open_checkpoint(base)) if has_weights else None
    names = SingleExpertNames(model, stored)
    experts = find_expert_places(model) if reader.expert_parameters else {}
    if experts:
        _check_single_experts(model, names, experts)
    adapters = {**reader.linears, **reader.expert_parameters}
    strongest = max(adapters, key=lambda name: adapters[name].scaling)
    weakest = min(adapters, key=lambda name: adapters[name].scaling)
    scaling = adapters[weakest].scaling
    if adapters[strongest].scaling > scaling * (1 + 1e-9):
        raise _refusal(
            f"the adapter multiplies {strongest} by {adapters[strongest].scaling:g} and {weakest}"
            f" by {scaling:g}, and servers know one strength for all; {_INSTEAD}"
        )
    dtypes = [reader.index.dtype(key) for key in reader.index]
    dtype = dtypes[0]
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    linears = {name: _stored_linear(name, names) for name in reader.linears}
    rank = max(adapter.rank for adapter in adapters.values())
    return PerExpertLayout(reader, rank, scaling, dtype, linears, experts, names)


def _refuse_other_tensors(reader: AdapterReader, model: PreTrainedModel) -> None:
    """Refuse what servers do not load, or load and never apply."""
    if reader.found.replaced:
        raise _refusal(
            f"the adapter replaces {min(reader.found.replaced)}, and servers load LoRA pairs only;"
            f" {_INSTEAD}"
        )
    routers = [n for n in reader.linears if not isinstance(model.get_submodule(n), nn.Linear)]
    if routers:
        raise _refusal(
            f"the adapter is on the router {routers[0]} too, where servers apply none; {_INSTEAD}"
        )
    expert_format = reader.found.expert_format
    if expert_format is not None and not isinstance(expert_format, FusedExperts):
        raise _refusal(
            "the adapter has one pair for each expert and projection already; serve it as it is"
        )


def _check_single_experts(
    model: PreTrainedModel, names: SingleExpertNames, places: Mapping[str, ExpertPlace]
) -> None:
    """Refuse experts that are not stored as one matrix for each expert and projection."""
    has_gate: dict[type, bool] = {}  # a spec finds the gate too, which costs
    for module_name, module in find_expert_modules(model).items():
        kind = type(module)
        if kind not in has_gate:
            has_gate[kind] = read_expert_spec(module).has_gate
        first = read_parameter_names(module)[0]
        for name in (n for n in places if n.rpartition(".")[0] == module_name):
            num_wanted = 2 if has_gate[kind] and name == f"{module_name}.{first}" else 1
            _check_layers(model, name, names, places[name], num_wanted)


def _check_layers(
    model: PreTrainedModel,
    name: str,
    names: SingleExpertNames,
    place: ExpertPlace,
    num_wanted: int,
) -> None:
    num_experts, num_out, num_in = place.shape
    layers = names.layers(name, 0)
    family = model.config.model_type
    if not layers:
        raise _refusal(
            f"{family} stores all experts of a layer in one tensor, so that {name} has no names"
            f" for single experts; serve the adapter as it is where the server reads PEFT's own"
            f" layout, or {_INSTEAD}"
        )
    shapes = [layer.shape for layer in layers]
    if shapes != [(num_out // num_wanted, num_in)] * num_wanted:
        raise _refusal(
            f"{family} stores {name} of an expert as {', '.join(layer.name for layer in layers)},"
            f" and servers take {num_wanted} of shape {(num_out // num_wanted, num_in)}; {_INSTEAD}"
        )
    if place.num_stored != num_experts:
        raise _refusal(
            f"{name} has rows for {place.num_stored} experts, of which {num_experts} compute"
            f" something, and servers have names for these only; {_INSTEAD}"
        )


def _stored_linear(name: str, names: SingleExpertNames) -> str:
    stored = names.linear(name)
    if stored is None:
        raise _refusal(f"{name} is not stored as one matrix, so that no server has it; {_INSTEAD}")
    return stored


def _refusal(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"adapter_layout is per-expert, but {reason}.", parameters=("adapter_layout",)
    )
