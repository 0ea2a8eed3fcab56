"""Find the routers of a model by what they do: on a small model of its class, see `small_model`.

A router is the module beside the experts, called last before them, on whose parameters the weights
of the chosen experts depend. A correction bias is a tensor beside the experts or in their router,
one value an expert and not trained, that decides which experts are chosen and not their weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.moe.expert_spec import find_expert_modules
from megablocks_utils.moe.model_facts import vocab_size

__all__ = ["BlockRouter", "CorrectionBias", "Routed", "find_correction_biases", "find_routers"]
__all__ += ["freeze_routers", "record_routing", "recognize_routers"]

_LARGE = 1e4
"""Added to the bias of an expert: every token must choose it."""


@dataclass(frozen=True)
class Routed:
    """What an experts module was called with.

    Attributes:
        top_k_index: (T, K) experts of each token; None if they are not told.
        top_k_weights: (T, K) their weights; the weighted tokens where these are not told.
        called_before: names of the modules beside it that were called before, in order.
    """

    top_k_index: Tensor | None
    top_k_weights: Tensor
    called_before: tuple[str, ...]


@dataclass(frozen=True)
class BlockRouter:
    """How the experts of one kind of block are routed; names are relative to the block.

    Attributes:
        block_class: class of the module that holds the experts.
        experts: name of the experts in it.
        router: name of the router.
        router_class: its class.
        parameters: what of the router, or of the block itself, the weights depend on.
        bias: name of the correction bias; None without one.
        bias_reason: why there is none.
    """

    block_class: str
    experts: str
    router: str
    router_class: str
    parameters: tuple[str, ...]
    bias: str | None
    bias_reason: str = ""

    def is_of(self, block: nn.Module, experts: str) -> bool:
        """Say whether the experts of a block are routed like this."""
        router = dict(block.named_modules()).get(self.router)
        return (
            type(block).__name__ == self.block_class
            and experts == self.experts
            and type(router).__name__ == self.router_class
        )


@dataclass(frozen=True)
class CorrectionBias:
    """A correction bias of a model.

    Attributes:
        experts: qualified name of the experts that it is for.
        owner: the module that holds it.
        attribute: its name there.
        name: its qualified name.
    """

    experts: str
    owner: nn.Module
    attribute: str
    name: str

    @property
    def tensor(self) -> Tensor:
        """The values as they are now."""
        return getattr(self.owner, self.attribute)


def recognize_routers(small: PreTrainedModel) -> list[BlockRouter]:
    """Return every kind of router of a small model, from forward passes.

    Raises:
        ConfigurationError: weights of experts depend on no module beside them.
    """
    routed, _ = record_routing(small)
    found: dict[tuple[str, str, str], BlockRouter] = {}
    for name, experts in find_expert_modules(small).items():
        if name not in routed:
            continue
        block, attribute = _block_of(small, name)
        parameters = _deciding_parameters(block, routed[name].top_k_weights)
        router = _last_called(block, routed[name].called_before, parameters)
        if router is None:
            raise ConfigurationError(
                f"no router of {name} can be found: the weights of its experts depend on no module"
                " beside them."
            )
        own = tuple(n for n in parameters if "." not in n or n.startswith(f"{router}."))
        kind = type(block).__name__, attribute, type(block.get_submodule(router)).__name__
        if kind not in found:
            bias, reason = _find_bias(small, name, experts.get_parameter("down_proj").shape[0])
            found[kind] = BlockRouter(kind[0], attribute, router, kind[2], own, bias, reason)
    return list(found.values())


def find_routers(
    model: PreTrainedModel, kinds: list[BlockRouter]
) -> Iterator[tuple[str, nn.Module, BlockRouter]]:
    """Yield for all experts of a model: their name, the block that holds them, how it routes.

    Raises:
        ConfigurationError: experts of a kind that is not among these.
    """
    for name in find_expert_modules(model):
        block, attribute = _block_of(model, name)
        kind = next((kind for kind in kinds if kind.is_of(block, attribute)), None)
        if kind is None:
            raise ConfigurationError(f"the router of {name} is not of a kind that was found.")
        yield name, block, kind


def freeze_routers(model: PreTrainedModel, kinds: list[BlockRouter]) -> list[str]:
    """Train no router; return the names of the parameters that are frozen."""
    frozen = []
    for name, block, kind in find_routers(model, kinds):
        prefix = name.removesuffix(kind.experts)
        for parameter_name in kind.parameters:
            block.get_parameter(parameter_name).requires_grad_(False)
            frozen.append(f"{prefix}{parameter_name}")
    return frozen


def find_correction_biases(
    model: PreTrainedModel, kinds: list[BlockRouter]
) -> list[CorrectionBias]:
    """Return the correction biases of a model, in the order of its layers."""
    biases = []
    for name, block, kind in find_routers(model, kinds):
        if kind.bias is not None:
            path, _, attribute = kind.bias.rpartition(".")
            owner = block.get_submodule(path)
            full_name = f"{name.removesuffix(kind.experts)}{kind.bias}"
            biases.append(CorrectionBias(name, owner, attribute, full_name))
    return biases


def record_routing(model: PreTrainedModel, **inputs: Any) -> tuple[dict[str, Routed], Any]:
    """Run a small model on a few tokens.

    Args:
        model: the small model.
        inputs: what its forward is given besides.

    Returns:
        What its experts modules were called with by name, and its outputs.
    """
    routed: dict[str, Routed] = {}
    handles = []
    called: list[nn.Module] = []
    for name in find_expert_modules(model):
        block, attribute = _block_of(model, name)
        children = {id(m): n for n, m in block.named_children() if n != attribute}

        def record(
            _module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            name: str = name,
            children: Mapping[int, str] = children,
        ) -> None:
            index, weights = routing_of(args, kwargs)
            names = tuple(children[id(m)] for m in called if id(m) in children)
            routed[name] = Routed(index, weights, names)

        experts = model.get_submodule(name)
        handles.append(experts.register_forward_pre_hook(record, with_kwargs=True))
        for child in block.children():
            handles.append(child.register_forward_hook(lambda module, *_: called.append(module)))
    try:
        device = next(model.parameters()).device
        tokens = torch.arange(min(48, vocab_size(model)), device=device)[None]
        outputs = model(input_ids=tokens, use_cache=False, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return routed, outputs


def routing_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
    """Return index and weights, (T, K) each, from the arguments of an experts module."""
    values = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False))
    values |= kwargs
    # Experts that are given nothing but tokens are given weighted ones.
    weights = values.get("top_k_weights", values["hidden_states"])
    return values.get("top_k_index"), weights


def _block_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _deciding_parameters(block: nn.Module, weights: Tensor) -> list[str]:
    """Return the names of a block's parameters that the experts' weights depend on."""
    named = {n: p for n, p in block.named_parameters() if p.requires_grad}
    if not weights.requires_grad:
        return []
    grads = torch.autograd.grad(
        weights.sum(), list(named.values()), retain_graph=True, allow_unused=True
    )
    return [name for name, grad in zip(named, grads, strict=True) if grad is not None]


def _last_called(block: nn.Module, called: tuple[str, ...], parameters: list[str]) -> str | None:
    """Return the last called module beside the experts that holds one of these parameters."""
    holders = {name.partition(".")[0] for name in parameters if "." in name}
    return next((name for name in reversed(called) if name in holders), None)


def _find_bias(small: PreTrainedModel, name: str, num_experts: int) -> tuple[str | None, str]:
    """Return the name of a block's correction bias, or why it has none."""
    block, attribute = _block_of(small, name)
    reason = "its routers have no correction bias"
    for bias_name, tensor in _untrained(block, attribute):
        if tensor.numel() != num_experts and "bias" in bias_name:
            reason = (
                f"{bias_name} has {tensor.numel()} values for {num_experts} experts: it also "
                "counts choices that are none of these"
            )
        if tensor.numel() == num_experts and _decides(small, name, tensor):
            return bias_name, ""
    return None, reason


def _untrained(block: nn.Module, experts: str) -> Iterator[tuple[str, Tensor]]:
    """Yield what a block keeps and does not train: persistent buffers and frozen parameters."""
    kept = set(block.state_dict(keep_vars=True))
    tensors = [*block.named_buffers(), *block.named_parameters()]
    for name, tensor in tensors:
        is_trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        is_kept = name in kept and not is_trained and not name.startswith(f"{experts}.")
        if is_kept and tensor.is_floating_point():
            yield name, tensor


@torch.no_grad()
def _decides(small: PreTrainedModel, name: str, tensor: Tensor) -> bool:
    """Say whether an expert with a large value is chosen by every token, with a usual weight."""
    flat, expert = tensor.view(-1), tensor.numel() - 1
    value = flat[expert].item()
    flat[expert] = value + _LARGE
    try:
        routed, _ = record_routing(small)
        after = routed[name]
    finally:
        flat[expert] = value
    if after.top_k_index is None:
        return False
    is_chosen = bool((after.top_k_index == expert).any(-1).all())
    return is_chosen and bool(after.top_k_weights.abs().max() < _LARGE / 100)
