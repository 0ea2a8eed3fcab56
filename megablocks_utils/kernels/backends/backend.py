"""What a backend is: one record that says how it runs, what it supports and how to install it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, Protocol

import torch
from torch import Tensor

from megablocks_utils.config.backends import BackendFacts, list_backends
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.device import DeviceFacts
from megablocks_utils.kernels.fused.tile import TileTable
from megablocks_utils.kernels.permute import ExpertOrder
from megablocks_utils.kernels.shapes import ExpertShapes, name_dtype
from megablocks_utils.kernels.weights import ExpertWeights

__all__ = ["Backend", "ExpertBackend"]


class ExpertBackend(Protocol):
    """Run local experts on tokens, from gathering them to the weighted sum.

    Takes tokens (T, H), the order of their N = T * K routed rows, routing weights (T, K) and the
    experts; returns (T, H). Without routing weights K is 1 and results are returned as they are: so
    expert parallelism runs rows of other ranks, which weight them when they are back.
    Differentiable in tokens, routing weights and all of the experts; every expert's weight gets a
    gradient, also without rows, and a frozen one costs no gradient of its size.
    """

    def __call__(  # noqa: D102
        self,
        tokens: Tensor,
        order: ExpertOrder,
        top_k_weights: Tensor | None,
        experts: ExpertWeights,
        /,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """A way to run experts: everything that the rest of the package knows of it.

    Attributes:
        facts: what options know of it.
        load: imports what runs the experts. Takes tiles, which are None unless `takes_tiles`.
        takes_tiles: whether a search for tiles can make it faster.
        packages: modules that must be there to import.
        install: line that installs them; None where they come with this project.
        dtypes: of compute; None is any.
        on_cpu: whether it runs on a CPU; "interpreted" is in Triton's interpreter, for tests.
        oldest_capability: CUDA's, that it needs; None is any.
        find_limit: says in a clause which limit of its own these experts exceed, or returns None.
        find_slowness: says in a clause why it must be slow for these experts, or returns None.
        serves_transformers: whether `register_experts_implementation` offers it.
    """

    facts: BackendFacts
    load: Callable[[TileTable | None], ExpertBackend]
    takes_tiles: bool = False
    packages: tuple[str, ...] = ()
    install: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    on_cpu: Literal["yes", "interpreted", "no"] = "yes"
    oldest_capability: tuple[int, int] | None = None
    find_limit: Callable[[ExpertShapes, DeviceFacts], str | None] = lambda _shapes, _device: None
    find_slowness: Callable[[ExpertShapes, DeviceFacts], str | None] = lambda _shapes, _device: None
    serves_transformers: bool = False

    @property
    def name(self) -> str:
        """As `--kernel` has it."""
        return self.facts.name

    def is_installed(self) -> bool:
        """Say whether its packages can be imported, without importing them."""
        return all(find_spec(name) is not None for name in self.packages)

    def find_unsupported_reason(self, shapes: ExpertShapes, device: DeviceFacts) -> str | None:
        """Say in a clause why it cannot run these experts here, or return None."""
        if not self.is_installed():
            return f"{self.name} is not installed"
        if shapes.has_adapters and not self.facts.supports_adapters:
            return f"{self.name} does not support LoRA on experts"
        if shapes.has_bias and not self.facts.supports_biases:
            return f"{self.name} does not support biases of experts"
        if shapes.weight_format is not None and not self.facts.supports_packed:
            return f"{self.name} has not been tried with packed experts"
        return (
            self._check_device(shapes.device_type, device)
            or self._check_dtype(shapes.dtype)
            or self.find_limit(shapes, device)
        )

    def refuse_unsupported(self, experts: ExpertWeights) -> None:
        """Raise for experts that have what this backend would leave out without a word.

        Adapters come after the choice of a backend, and so do biases.

        Raises:
            ConfigurationError: adapters or biases that it does not support.
        """
        cause = works = None
        if experts.has_adapters and not self.facts.supports_adapters:
            cause, works = "LoRA on experts", list_backends(with_adapters=True)
        elif experts.has_biases and not self.facts.supports_biases:
            cause, works = "biases of experts", list_backends(with_biases=True)
        if cause is not None and works is not None:
            raise ConfigurationError(
                f"kernel is {self.name}, but {self.name} does not support {cause}; "
                f"kernel {join_words(works)} does.",
                parameters=("kernel",),
            )

    def _check_device(self, device_type: str, device: DeviceFacts) -> str | None:
        needed, seen = self.oldest_capability, device.capability
        if seen is not None and needed is not None and seen < needed:
            return (
                f"{self.name} needs compute capability {_dotted(needed)} or newer, and "
                f"{device.name} has {_dotted(seen)}"
            )
        if device_type == "cuda" or self.on_cpu == "yes":
            return None
        if self.on_cpu == "interpreted":
            hint = " (or TRITON_INTERPRET=1, Triton's interpreter, for tests)"
            return None if device.is_interpreter else f"{self.name} needs a CUDA device{hint}"
        return f"{self.name} needs a CUDA device, and the device is {device_type}"

    def _check_dtype(self, dtype: torch.dtype) -> str | None:
        if self.dtypes is None or dtype in self.dtypes:
            return None
        known = join_words([name_dtype(known) for known in self.dtypes])
        return f"{self.name} computes in {known}, not {name_dtype(dtype)}"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
