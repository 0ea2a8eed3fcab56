"""Whether our Triton kernels can run here, said without importing Triton."""

from importlib.util import find_spec

import torch

from megablocks_utils.kernels.device import DeviceFacts
from megablocks_utils.kernels.gate import SwiGlu
from megablocks_utils.kernels.shapes import ExpertShapes

__all__ = [
    "OLDEST_CAPABILITY",
    "TRITON_INSTALL",
    "find_triton_unsupported_reason",
    "is_triton_installed",
]

TRITON_INSTALL = "pip install triton"
OLDEST_CAPABILITY = (8, 0)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_triton_installed() -> bool:
    """Say whether there is a Triton to import."""
    return find_spec("triton") is not None


def find_triton_unsupported_reason(shapes: ExpertShapes, device: DeviceFacts) -> str | None:
    """Say in a clause why the kernels cannot run these experts here, or return None.

    Sizes are no unsupported_reason: every load and store is masked.
    """
    if shapes.device_type == "cpu" and not device.is_interpreter:
        return (
            "our Triton kernels need a CUDA GPU (on a CPU they run with TRITON_INTERPRET=1 alone, "
            "Triton's interpreter, for tests)"
        )
    if device.capability is not None and device.capability < OLDEST_CAPABILITY:
        seen, wanted = (".".join(map(str, pair)) for pair in (device.capability, OLDEST_CAPABILITY))
        return (
            f"our Triton kernels need compute capability {wanted} or newer, and {device.name} has "
            f"{seen}"
        )
    if shapes.dtype not in _DTYPES:
        return f"our Triton kernels do not take {str(shapes.dtype).removeprefix('torch.')}"
    if not isinstance(shapes.gate, SwiGlu):
        return (
            "our Triton kernels know SwiGLU and its clamped form, and this model's gate is another"
        )
    return None
