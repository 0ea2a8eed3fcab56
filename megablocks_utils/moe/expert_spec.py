"""What the experts of a layer are: read off transformers' module, once, and true of ours too."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from megablocks_utils.config.quantization import check_packed_slices
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.families import UNMARKED_EXPERTS, UnmarkedExperts
from megablocks_utils.kernels.gate import SWIGLU, Gate, KnownFunction
from megablocks_utils.kernels.weights import ExpertWeights
from megablocks_utils.mesh.placement import DimSplit
from megablocks_utils.moe.own_gate import ADAPTED_PART, POST_NORM, Recognised, find_gate

__all__ = [
    "ExpertSpec",
    "find_expert_modules",
    "find_expert_parameters",
    "read_expert_spec",
    "read_expert_specs",
    "read_parameter_names",
]

# What transformers' experts interface sets in every module that it serves.
_MARK = "_is_expert_parallel"


@dataclass(frozen=True)
class ExpertSpec:
    """What the experts of a layer are and how their weights are stored.

    The first projection has F outputs: 2 * I with a gate, I without.

    Attributes:
        num_experts: E, without zero experts.
        hidden_size: H, of what the experts are given; the model's own or a latent size.
        intermediate_size: I.
        has_gate: whether the first projection has a gate beside up.
        has_bias: whether both projections have a bias, (E, F) and (E, H).
        is_transposed: whether weights are stored (E, in, out) instead of (E, out, in).
        is_interleaved: whether outputs of the first projection are gate, up, gate, up, ...
        gate: makes (R, I) of gate and up, (R, I) each; of up alone without a gate.
        num_zero_experts: how many expert numbers from E on return the token as it is.
        has_post_norm: whether `post_expert_norm` normalises each expert's result before it is
            weighted.
        is_weighted_before: whether the tokens are weighted before the experts, in the block.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_interleaved: bool = False
    gate: Gate = SWIGLU
    num_zero_experts: int = 0
    has_post_norm: bool = False
    is_weighted_before: bool = False

    @property
    def first_projection(self) -> str:
        """Name of the first weights."""
        return "gate_up_proj" if self.has_gate else "up_proj"

    @property
    def projections(self) -> tuple[str, str]:
        """Names of the two weights."""
        return self.first_projection, "down_proj"

    @property
    def kind(self) -> Hashable:
        """What is equal for layers that run alike; a module's own gate is not told from others."""
        gate = self.gate if isinstance(self.gate, KnownFunction) else None
        return replace(self, gate=SWIGLU), gate

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the experts' parameters: the projections, and their biases if they have any."""
        biases = [f"{name}_bias" for name in self.projections] if self.has_bias else []
        return (*self.projections, *biases)

    def find_split(self, parameter_name: str) -> DimSplit | None:
        """Return how `expert_tp` cuts a weight or bias: along I; None for one without."""
        first, _ = self.projections
        is_first = parameter_name.startswith(first)
        num_parts = 2 if is_first and self.has_gate and not self.is_interleaved else 1
        if parameter_name.endswith("_bias"):
            return DimSplit(1, num_parts) if is_first else None
        return DimSplit(1 if is_first != self.is_transposed else 2, num_parts)

    def find_lora_splits(self, projection: str) -> tuple[DimSplit | None, DimSplit | None]:
        """Return how it cuts the factors (E, r, in) and (E, out, r) of a projection's adapter."""
        split = self.find_split(projection)
        assert split is not None, projection
        if projection == self.first_projection:
            return None, DimSplit(1, split.num_parts)
        return DimSplit(2), None

    def check_slices(self, expert_tp_size: int, weight_format: str | None = None) -> None:
        """Refuse to cut experts into slices of different sizes, or through a block of packed ones.

        Args:
            expert_tp_size: how many slices.
            weight_format: what the experts are packed in, or None.

        Raises:
            ConfigurationError: the intermediate size does not divide.
        """
        if self.intermediate_size % expert_tp_size:
            raise ConfigurationError(
                f"expert_tp_size is {expert_tp_size}, but it must divide the intermediate size of "
                f"the experts, which is {self.intermediate_size}.",
                parameters=("expert_tp_size",),
            )
        if weight_format is not None:
            check_packed_slices(weight_format, self.intermediate_size, expert_tp_size)

    def build_weights(self, tensors: Mapping[str, Tensor]) -> ExpertWeights:
        """Return what a backend computes with, of some of the experts, without adapters.

        Args:
            tensors: by `parameter_names`, the same experts of each.
        """
        first, down = self.projections
        return ExpertWeights(
            tensors[first],
            tensors[down],
            self.gate,
            gate_up_bias=tensors.get(f"{first}_bias"),
            down_bias=tensors.get(f"{down}_bias"),
            is_transposed=self.is_transposed,
            is_interleaved=self.is_interleaved,
            has_gate=self.has_gate,
        )


def find_expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Find the experts of every MoE layer, transformers' or ours: qualified name -> module.

    They are recognised by the mark of transformers' experts interface, not by names or shapes.
    """
    return {name: module for name, module in model.named_modules() if _is_experts(module)}


def find_expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the experts' own weights and biases, without adapters, by qualified name."""
    return {
        f"{module_name}.{name}": module.get_parameter(name)
        for module_name, module in find_expert_modules(model).items()
        for name in read_parameter_names(module)
    }


def read_parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return what `ExpertSpec.parameter_names` is, without looking for the gate."""
    if isinstance(spec := getattr(module, "spec", None), ExpertSpec):
        return spec.parameter_names
    tensors = [getattr(module, name, None) for name in ("up_proj", "gate_up_proj", "down_proj")]
    if any(isinstance(tensor, Tensor) and tensor.dim() == 1 for tensor in tensors):
        # FSDP1 has flattened them: what it holds says no sizes, but the module's flags say names.
        flags = {
            name: getattr(module, name, name == "has_gate") for name in ("has_gate", "has_bias")
        }
        return ExpertSpec(
            *(0, 0, 0), **flags, is_transposed=False, is_interleaved=False, gate=SWIGLU
        ).parameter_names
    return _read_storage(module, SWIGLU).parameter_names


def read_expert_spec(module: nn.Module) -> ExpertSpec:
    """Read off what the experts of a layer are.

    Args:
        module: from `find_expert_modules`; it may be on meta.

    Raises:
        ConfigurationError: weights that the interface does not describe.
    """
    return _read_spec(module, {})


def read_expert_specs(modules: Mapping[str, nn.Module]) -> dict[str, ExpertSpec]:
    """Do what `read_expert_spec` does for each of some modules; gates are recognised once a kind.

    Raises:
        ConfigurationError: as `read_expert_spec`.
    """
    recognised: Recognised = {}
    return {name: _read_spec(module, recognised) for name, module in modules.items()}


def _read_spec(module: nn.Module, recognised: Recognised) -> ExpertSpec:
    if isinstance(spec := getattr(module, "spec", None), ExpertSpec):
        return spec
    spec = _read_storage(module, find_gate(module, recognised))
    _refuse_unknown_parameters(module, spec)
    return spec


def _is_experts(module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "spec", None), ExpertSpec)
        or hasattr(module, _MARK)
        or _find_unmarked(module) is not None
    )


def _find_unmarked(module: nn.Module) -> UnmarkedExperts | None:
    """Look a module's class up in the table; its bases too, since adapters derive classes."""
    names = (base.__name__ for base in type(module).__mro__)
    return next((UNMARKED_EXPERTS[name] for name in names if name in UNMARKED_EXPERTS), None)


def _read_storage(module: nn.Module, gate: Gate) -> ExpertSpec:
    known = _find_unmarked(module) or UnmarkedExperts()
    has_gate = getattr(module, "has_gate", True)
    is_transposed = getattr(module, "is_transposed", known.is_transposed)
    num_experts, *sizes = _shape(module, "down_proj")
    hidden_size, intermediate_size = reversed(sizes) if is_transposed else sizes
    spec = ExpertSpec(
        num_experts,
        hidden_size,
        intermediate_size,
        has_gate=has_gate,
        has_bias=getattr(module, "has_bias", False),
        is_transposed=is_transposed,
        is_interleaved=not getattr(module, "is_concatenated", True),
        gate=gate,
        has_post_norm=getattr(module, "has_post_expert_norm", False),
        is_weighted_before=known.is_weighted_before,
    )
    num_first, *seen = _shape(module, spec.first_projection)
    outputs = intermediate_size * (2 if has_gate else 1)
    wanted = [hidden_size, outputs] if is_transposed else [outputs, hidden_size]
    if seen != wanted or num_first < num_experts:
        raise ConfigurationError(
            f"{spec.first_projection} of {type(module).__name__} is {(num_first, *seen)}, but it "
            f"must be {(num_experts, *wanted)} beside its down_proj."
        )
    # What has a first projection and no second is never computed with.
    return replace(spec, num_zero_experts=num_first - num_experts)


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.dim() != 3:
        seen = "missing" if weight is None else f"not one tensor of three dims: {weight}"
        raise ConfigurationError(f"{name} of {type(module).__name__} is {seen}.")
    return tuple(weight.shape)


def _refuse_unknown_parameters(module: nn.Module, spec: ExpertSpec) -> None:
    """Refuse what would be left behind when the module's weights are taken."""
    for name, _ in module.named_parameters():
        part = name.partition(".")[0]
        is_known = part == ADAPTED_PART or (part == POST_NORM and spec.has_post_norm)
        if name not in spec.parameter_names and not is_known:
            raise ConfigurationError(
                f"{type(module).__name__} has a parameter {name}, and transformers' experts "
                "interface does not say what it does."
            )
