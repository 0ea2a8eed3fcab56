"""The table of backends, and what is said of one that is unknown or cannot run."""

from collections.abc import Mapping
from types import MappingProxyType

from megablocks_utils.config.backends import KERNEL_CHOICES
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError, MissingKernelError
from megablocks_utils.kernels.backends.backend import Backend
from megablocks_utils.kernels.backends.eager import EAGER
from megablocks_utils.kernels.backends.grouped_mm import GROUPED_MM
from megablocks_utils.kernels.backends.megablocks import MEGABLOCKS
from megablocks_utils.kernels.backends.scattermoe import SCATTERMOE
from megablocks_utils.kernels.backends.triton import TRITON
from megablocks_utils.kernels.device import DeviceFacts
from megablocks_utils.kernels.shapes import ExpertShapes

__all__ = ["BACKENDS", "check_backend"]

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {backend.name: backend for backend in (EAGER, GROUPED_MM, TRITON, SCATTERMOE, MEGABLOCKS)}
)
"""All of them by name; of several that take the same time, `auto` takes the first."""


def check_backend(kernel: str, shapes: ExpertShapes, device: DeviceFacts) -> None:
    """Check that a backend named by the caller exists and can run these experts here.

    Raises:
        ConfigurationError: it is unknown, or cannot run them.
        MissingKernelError: it is not installed.
    """
    if kernel not in BACKENDS:
        raise ConfigurationError(
            f"kernel is {kernel}, but it must be {join_words(KERNEL_CHOICES)}.",
            parameters=("kernel",),
        )
    backend = BACKENDS[kernel]
    reason = backend.find_unsupported_reason(shapes, device)
    if reason is None:
        return
    if not backend.is_installed():
        raise MissingKernelError(
            f"kernel is {kernel}, but {reason}; install it with: {backend.install}",
            parameters=("kernel",),
        )
    works = [
        name
        for name, other in BACKENDS.items()
        if other.find_unsupported_reason(shapes, device) is None
    ]
    raise ConfigurationError(
        f"kernel is {kernel}, but {reason}; kernel {join_words(works)} works.",
        parameters=("kernel",),
    )
