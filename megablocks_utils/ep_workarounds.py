"""Mend three faults of transformers 5.23 around experts that run on our code.

`tests/test_ep_implementation.py` fails when a release has mended one: it can then be deleted here.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import Transpose
from transformers.distributed import DistributedConfig
from transformers.distributed.mixin import DistributedMixin
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

__all__ = ["mend_transformers"]

Plan = dict[str, str]


@cache
def mend_transformers(ep_implementation: str) -> None:
    """Replace the two faulty methods; calling it again changes nothing.

    Args:
        ep_implementation: the only one for which plans are changed.
    """
    _mend_plans(ep_implementation)
    _mend_transposes()


def _mend_plans(ep_implementation: str) -> None:
    """Split nothing but experts over the ep group where its ranks have examples of their own.

    And sum over the tp group the gradients of norms on heads that are split over it: the TP plans
    of Qwen3-VL-MoE and GLM-4 MoE leave them out, so that each rank trains its copy on its own
    heads alone.

    The EP plans of Gemma 4 and DiffusionGemma split the dense MLP, too, by tensor parallelism over
    the ep group. That needs the same examples on all its ranks, and FSDP2 cannot shard the result
    again ("Cannot concatenate overlapping meshes").
    """
    original = DistributedMixin._resolve_parallel_plans

    @wraps(original)
    def resolve(self: DistributedMixin, config: DistributedConfig) -> tuple[Plan, Plan, Plan]:
        if config.ep_implementation == ep_implementation:
            if config.dp_size > 1:
                self._ep_plan = _keep_experts(self.ep_plan)
            self._tp_plan = self.tp_plan | _find_norms_of_heads(self)
        return original(self, config)

    _replace(DistributedMixin, resolve)


def _replace(owner: type, method: Callable[..., Any]) -> None:
    """Put a method in the place of the one that it wraps."""
    setattr(owner, method.__name__, method)


def _keep_experts(plan: Plan) -> Plan:
    """Return the rules of experts and of what is in them."""
    experts = tuple(name for name, style in plan.items() if style == "ep_dispatch_experts")
    inside = tuple(f"{name}." for name in experts)
    return {
        name: style for name, style in plan.items() if name in experts or name.startswith(inside)
    }


def _find_norms_of_heads(model: DistributedMixin) -> Plan:
    """Return rules for norms beside a projection that is split by heads, if they have none."""
    assert isinstance(model, nn.Module)
    modules = {replace_layer_number_by_wildcard(name) for name, _ in model.named_modules()}
    rules = {}
    for name, style in model.tp_plan.items():
        norm = name.removesuffix("_proj") + "_norm"
        if style == "colwise" and norm in modules and norm not in model.tp_plan:
            rules[norm] = "replicated_with_grad_allreduce"
    return rules


def _mend_transposes() -> None:
    """Compare this rank's part of a stored tensor with its part of the parameter.

    `Transpose(check_dims=True)` compares it with the whole parameter, so that every split tensor is
    transposed, also one that is stored as the model has it: Qwen3-VL-MoE's experts in a folder that
    transformers itself has saved ("You set `ignore_mismatched_sizes` to `False`").
    """
    original: Any = Transpose.convert  # torch's decorator hides its type

    @wraps(original)
    def convert(
        self: Transpose,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        if self.check_dims:
            parameter = kwargs["model"].get_parameter(kwargs["full_layer_name"])
            found = next(iter(input_dict.values()))
            tensor: Tensor = found[0] if isinstance(found, list) else found
            if isinstance(parameter, DTensor) and tensor.shape == parameter.to_local().shape:
                target = self.get_target_pattern(input_dict, source_patterns, target_patterns)
                return {target: tensor}
        converted: dict[str, Tensor] = original(
            self, input_dict, source_patterns, target_patterns, **kwargs
        )
        return converted

    _replace(Transpose, convert)
