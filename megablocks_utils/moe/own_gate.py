"""The gate of a module of experts: one that the kernels know, or the module's own code."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.gate import (
    ActivationGate,
    Gate,
    KnownFunction,
    list_activations,
    list_gates,
    recognise_gate,
)

__all__ = ["ADAPTED_PART", "POST_NORM", "OwnGate", "Recognised", "find_gate"]

Recognised = dict[Hashable, KnownFunction | None]
"""Which gate of the kernels' modules of a kind have; None where it is the module's own."""

POST_NORM = "post_expert_norm"
"""Name of the norm behind the experts, in the modules that have one."""

ADAPTED_PART = "parametrizations"
"""Where torch keeps the weights of a module while PEFT adapts them."""


def find_gate(module: nn.Module, recognised: Recognised) -> Gate:
    """Return the module's gate: one that the kernels know where its values are the same."""
    shell = _strip_weights(module)
    own = _own_gate(module, shell)
    kind = type(module), repr(shell), tuple(_settings(shell))
    if kind not in recognised:
        has_gate = getattr(module, "has_gate", True)
        candidates = list_gates(_numbers(shell)) if has_gate else list_activations()
        try:
            gate = recognise_gate(own, candidates)
        except (AttributeError, TypeError) as error:
            raise ConfigurationError(
                f"what {type(module).__name__} does between its projections cannot be told from "
                f"its gate and up values alone: {error}"
            ) from error
        recognised[kind] = gate if isinstance(gate, KnownFunction) else None
    return recognised[kind] or own


def _own_gate(module: nn.Module, shell: nn.Module) -> Gate:
    has_gate = getattr(module, "has_gate", True)
    apply = getattr(shell, "_apply_gate", None)
    if has_gate and callable(apply):
        return OwnGate(apply, not getattr(module, "is_concatenated", True))
    activation = getattr(module, "act_fn", None)
    if not callable(activation):
        raise ConfigurationError(f"{type(module).__name__} has no act_fn between its projections.")
    return ActivationGate(activation) if has_gate else activation


@dataclass(frozen=True)
class OwnGate:
    """Call a module's own `_apply_gate`, which splits what it is given.

    Attributes:
        apply: that method, of a copy of the module without its weights.
        is_interleaved: how it splits.
    """

    apply: Callable[[Tensor], Tensor]
    is_interleaved: bool

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Apply it to gate and up (R, I) each."""
        if self.is_interleaved:
            joined = torch.stack([gate, up], dim=-1).flatten(-2)
        else:
            joined = torch.cat([gate, up], dim=-1)
        return self.apply(joined)


def _strip_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a module without its parameters, so that its gate keeps none alive."""
    # Not `copy.copy`: classes that FSDP2 derives are made anew by calling them.
    shell = object.__new__(type(module))
    shell.__dict__ = dict(module.__dict__)
    shell._parameters = {}
    heavy = (POST_NORM, ADAPTED_PART)
    shell._modules = {name: part for name, part in module._modules.items() if name not in heavy}
    return shell


def _numbers(module: nn.Module) -> Iterator[float]:
    """Yield every number that a module holds, under whatever name: its gate's are among them."""
    for value in _settings(module):
        if isinstance(value, float | int) and not isinstance(value, bool):
            yield float(value)


def _settings(module: nn.Module) -> Iterator[float | str]:
    """Yield every number, flag and word that a module and its parts hold."""
    for value in (value for part in module.modules() for value in vars(part).values()):
        if isinstance(value, float | int | str):
            yield value
