"""How many parameters a model has, uses for one token and trains, and what a rank holds of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megablocks_utils.quantization.packed_experts import PackedExperts, list_stored

__all__ = ["ParameterCounts", "count_local_bytes", "count_parameters", "describe_packed"]


@dataclass(frozen=True)
class ParameterCounts:
    """Count the parameters of the whole model, not of one rank.

    Attributes:
        total: All parameters, tied ones once.
        active: Those one token passes: everything outside the experts, and top_k experts a layer;
            None where the model does not say how many these are.
        trainable: Those that require a gradient.
        flops_per_token: Operations of forward and backward for an input token, those of `mfu`: for
            each active parameter two forward, two for the gradient of its input, and two for
            its own where it is trained. An embedding that is only looked up has none, and neither
            scores of attention nor what is recomputed count. None where `active` is.
    """

    total: int
    active: int | None
    trainable: int
    flops_per_token: int | None = None


def count_parameters(
    model: nn.Module, expert_parameters: Mapping[str, Tensor], top_k: int | None
) -> ParameterCounts:
    """Count parameters from their global shapes.

    A DTensor's shape is global, so any rank of an expert-parallel or FSDP2 model gives the same
    counts. FSDP1 flattens and pads parameters: count before wrapping with it.

    Args:
        model: The model, its experts included; tensors on the meta device count too.
        expert_parameters: Every parameter of the experts of `model`, adapters too, all experts of a
            layer along dim 0.
        top_k: Experts a token passes in each MoE layer, or None.
    """
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    experts = expert_parameters.values()
    in_experts = sum(parameter.numel() for parameter in experts)
    passed = [p.numel() * top_k // p.shape[0] for p in experts] if top_k is not None else None
    flops = None if top_k is None else _count_flops(model, expert_parameters, top_k)
    return ParameterCounts(
        total=total,
        active=None if passed is None else total - in_experts + sum(passed),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        flops_per_token=flops,
    )


def _count_flops(model: nn.Module, expert_parameters: Mapping[str, Tensor], top_k: int) -> int:
    experts = {id(parameter) for parameter in expert_parameters.values()}
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    used = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    looked_up = {id(weight) for weight in embeddings} - used
    flops = 0
    for parameter in model.parameters():
        if id(parameter) in looked_up:
            continue
        share = top_k / parameter.shape[0] if id(parameter) in experts else 1
        flops += round(parameter.numel() * share) * (6 if parameter.requires_grad else 4)
    return flops


def count_local_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes this rank holds of `tensors`: a DTensor's own shard, a plain tensor whole."""
    return sum(stored.nbytes for tensor in map(_local, tensors) for stored in list_stored(tensor))


def describe_packed(tensors: Iterable[Tensor]) -> str | None:
    """Say which format this rank holds tensors in, and how large; None where none is packed."""
    packed = [local for local in map(_local, tensors) if isinstance(local, PackedExperts)]
    if not packed:
        return None
    num_bytes = sum(stored.nbytes for local in packed for stored in list_stored(local))
    num_weights = sum(local.numel() for local in packed)
    size = f", {num_bytes / num_weights:.3f} bytes each" if num_weights else ""
    return f"the experts' frozen weights, in {packed[0].format_name}{size}"


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
