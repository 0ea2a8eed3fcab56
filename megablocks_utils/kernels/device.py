"""What the choice of a backend must know of this machine: read here, and handed on as a value."""

import os
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata

import torch

__all__ = ["DeviceFacts", "has_gpu", "is_interpreted", "read_device_facts"]


@dataclass(frozen=True)
class DeviceFacts:
    """Describe the device that runs the experts, and what it is programmed with.

    Attributes:
        name: the GPU's, as its driver says; "cpu" without one.
        capability: CUDA's compute capability, (9, 0) for Hopper; None without a GPU.
        is_interpreter: whether Triton interprets kernels on the CPU, which is for tests.
        torch_version: "2.13.0".
        triton_version: None where it is not installed.
    """

    name: str
    capability: tuple[int, int] | None
    is_interpreter: bool
    torch_version: str
    triton_version: str | None


def has_gpu() -> bool:
    """Say whether torch finds a CUDA GPU."""
    return torch.cuda.is_available()


def read_device_facts(device_type: str) -> DeviceFacts:
    """Look at this process's own device: nothing else here asks CUDA what there is.

    Args:
        device_type: `cpu` or `cuda`.
    """
    is_cuda = device_type == "cuda"
    return DeviceFacts(
        name=torch.cuda.get_device_name() if is_cuda else "cpu",
        capability=torch.cuda.get_device_capability() if is_cuda else None,
        is_interpreter=not is_cuda and is_interpreted(),
        torch_version=torch.__version__,
        triton_version=_triton_version(),
    )


def is_interpreted() -> bool:
    """Say whether the environment asks Triton for its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_version() -> str | None:
    """Return the version without importing Triton, which reads its environment only once."""
    for name in ("triton", "pytorch-triton"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None
